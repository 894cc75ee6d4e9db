# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fresh data, exactly
#
# CoPG needs no probabilities of the policy that wrote its data. So data may be anything: the learner's own samples of now
# and of before, people's texts, or pairs of one and the other. On the bandit of Sec. 5 what each choice does is exact. Nothing
# is defined here; every formula lives in `copg_jax.bandit` and is tested there.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from copg_jax.bandit import exact, population, train

jax.config.update("jax_enable_x64", True)
# %config InlineBackend.figure_formats = ["png"]
plt.rcParams.update({"figure.dpi": 90, "font.size": 9, "axes.grid": True, "grid.alpha": 0.25})
np.set_printoptions(precision=5, suppress=True)
bandit = train.bandit_from_config(train.BanditConfig())
print("µ1", bandit.mu1, "  µ2", bandit.mu2)

# %% [markdown]
# ## 1. Pairs of one µ, or across two
# Eq. (6) takes y from µ1 and y' from µ2. A group with completions of both can use all of its pairs, or those across alone
# (`loss.pairs=cross`). Both end at π*, since βΔ = ΔR on every pair that can be drawn says the same whatever the weights are.
# They get there at other speeds: the rates are β times the eigenvalues of the graph of pairs.

# %%
pooled = 0.5 * (bandit.mu1 + bandit.mu2)
for name, mu1, mu2 in (("across", bandit.mu1, bandit.mu2), ("all   ", pooled, pooled)):
    data = bandit._replace(mu1=mu1, mu2=mu2)
    end = population.end_of(population.GRADIENTS["copg"], data)
    rates = -bandit.beta * jnp.linalg.eigvalsh(exact.pair_laplacian(exact.pair_weights(mu1, mu2)))
    print(f"{name}: regret at the end {abs(exact.regret(end, bandit)):.0e}, rates {rates[1:]}")

# %% [markdown]
# Where two samplers share no completion, pairs across are the only ones that tell how their completions compare. Within each
# sampler nothing joins the two.

# %%
first, second = jnp.array([0.4, 0.6, 0.0]), jnp.array([0.0, 0.0, 1.0])
across = exact.pair_weights(first, second)
within = exact.pair_weights(first, first) + exact.pair_weights(second, second)
print("sets of arms that pairs across join:", exact.pair_components(across))
print("sets of arms that pairs within join:", exact.pair_components(within))

# %% [markdown]
# ## 2. Replay, and data that others wrote
# In each round the policy of now draws, and two gradient steps follow on the mean of the last W rounds: of these alone, mixed
# half and half with fixed data of others, or in pairs across the two. No importance weights. The end is π* every time; W and
# the mixture decide how fast, by how often rare arms are drawn.

# %%
offline = jnp.array([0.05, 0.05, 0.9])
samplers = {
    "fresh": lambda fresh: (fresh, fresh),
    "half offline": lambda fresh: ((fresh + offline) / 2, (fresh + offline) / 2),
    "across fresh and offline": lambda fresh: (fresh, offline),
}
fig, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True)
for ax, (name, sampler) in zip(axes, samplers.items(), strict=True):
    for window in (1, 4, 16):
        regrets = population.regret_by_round(
            bandit, sampler, num_rounds=40, steps_per_round=2, replay_rounds=window
        )
        ax.semilogy(jnp.maximum(regrets, 1e-12), label=f"W = {window}")
        print(f"{name:25} W = {window:2}: regret after 10 rounds {regrets[10]:.1e}")
    ax.set(title=name, xlabel="round")
axes[0].set_ylabel("regret")
axes[0].legend()
plt.show()

# %% [markdown]
# ## 3. What top-p costs
# Theorem 1 wants µ to draw all that π_ref can write. Top-p cuts the tail off. An arm that is never drawn keeps its logit, and
# the policy cannot tell what it is worth. Here π_ref = (0.2, 0.5, 0.3) and the best arm is the first, its least likely one.
# *Offline*, samples are of π_ref: nothing is lost down to p = 0.8, and there the best arm is lost at once. *Online*, samples
# are of the learner: as it grows surer, more arms are cut off, so that it loses something at any p below 0.97 or so.

# %%
ref = jnp.array([0.2, 0.5, 0.3])
problem = exact.make_bandit([2.5, 2.0, 1.0], mu1=ref, mu2=ref, ref=ref, beta=0.5)


@jax.jit
@jax.vmap
def cost(top_p):
    """Regret at the end of training offline and online."""
    mu = population.truncated(ref, top_p)
    end = population.end_on_pairs(problem._replace(mu1=mu, mu2=mu))
    online = population.regret_by_round(
        problem,
        samplers["fresh"],
        num_rounds=2000,
        steps_per_round=1,
        draw=lambda policy: population.truncated(policy, top_p),
    )
    return exact.regret(end, problem), online[-1]


levels = jnp.linspace(0.45, 1.0, 56)
offline_cost, online_cost = cost(levels)
plt.figure(figsize=(5, 3))
plt.plot(levels, offline_cost, label="samples of π_ref")
plt.plot(levels, online_cost, label="samples of the learner")
plt.axhline(float(exact.regret(jnp.log(ref), problem)), color="grey", ls=":", label="no training")
plt.xlabel("top-p")
plt.ylabel("regret at the end")
plt.legend()
plt.show()
for p in (1.0, 0.95, 0.9, 0.8, 0.5):
    off, on = cost(jnp.array([p]))
    print(f"p = {p}: offline {abs(off[0]):.5f}, online {abs(on[0]):.5f}")

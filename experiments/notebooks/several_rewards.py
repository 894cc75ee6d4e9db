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
# # Several rewards, exactly
#
# The paper leaves the multi-objective setting open. With rewards $R_1,\dots,R_n$ that conflict one wants the policies that are best for
# $\sum_i w_iR_i$, for every weight. Are there as many runs needed as weights? On a bandit each answer is a number. The formulas are in
# `copg_jax.bandit.several` and are tested there.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from copg_jax.bandit import exact, population, several

jax.config.update("jax_enable_x64", True)
# %config InlineBackend.figure_formats = ["png"]
plt.rcParams.update({"figure.dpi": 90, "font.size": 9, "axes.grid": True, "grid.alpha": 0.25})
np.set_printoptions(precision=4, suppress=True)
rng = np.random.default_rng(7)
num_arms = 12
good = rng.normal(size=num_arms)
rewards = jnp.array([good, 0.5 * rng.normal(size=num_arms) - good])  # two judges who disagree
ref, mu = rng.dirichlet(np.full(num_arms, 2.0), size=2)
bandit = exact.make_bandit(good, ref=ref, mu1=mu, mu2=mu, beta=0.5)
share = jnp.linspace(0, 1, 21)
weights = jnp.stack([share, 1 - share], 1)
print("correlation of the rewards:", np.corrcoef(rewards)[0, 1])

# %% [markdown]
# ## 1. Log-ratios add as rewards do
# $\beta\ln(\pi_i/\pi_{\mathrm{ref}})=R_i+\text{const}$ at the optimum of $R_i$, so that
# $$\ln\pi_w=\ln\pi_{\mathrm{ref}}+\sum_iw_i\,(\ln\pi_i-\ln\pi_{\mathrm{ref}})-\text{const}$$
# is the optimum of $\sum_iw_iR_i$. If the weights sum to 1, that is an interpolation of the logits, and π_ref drops out. CoPG finds each π_i from
# data of any μ. So two runs give the whole front, which a run for each weight gives too: below, CoPG's fixed points of the weighted
# sums are compared with the interpolation of the fixed points of the two rewards.


# %%
def run(reward):
    """Where CoPG ends from π_ref, on pairs of μ."""
    problem = bandit._replace(reward=reward)
    follow = lambda logits: population.direction("copg", logits, problem)
    return jax.nn.log_softmax(population.fixed_point(follow, jnp.log(bandit.ref)))


runs = jax.jit(jax.vmap(run))
of_sums = runs(weights @ rewards)
ends = runs(rewards)
joined = jax.vmap(several.interpolate_logits, (None, 0, None))(ends, weights, bandit)
mixed = jax.vmap(several.mix_policies, (None, 0))(ends, weights)
fronts = {
    "a run for each weight": several.measure_front(of_sums, rewards, weights, bandit),
    "two runs, logits interpolated": several.measure_front(joined, rewards, weights, bandit),
    "two runs, answers mixed": several.measure_front(mixed, rewards, weights, bandit),
}
print(
    "largest total variation between the first two:",
    f"{exact.total_variation(of_sums, joined):.1e}",
)
for name, front in fronts.items():
    print(f"{name:30s} largest regret {front.regret.max():.2e}")

# %% [markdown]
# ## 2. The front, and what mixing loses
# With weights that sum to 1 the objective is $\sum_iw_iJ_i$, $J_i=\mathbb E[R_i]-\beta\,\mathrm{KL}$, so that the front is one of the $J_i$. To draw
# each answer from one of the two policies gets the expected rewards of the chord between them, which are higher where the rewards cancel in the
# sum; but it pays for them with a KL that is several times as large, and stays behind the front.

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
styles = {
    "a run for each weight": "o",
    "two runs, logits interpolated": "-",
    "two runs, answers mixed": "--",
}
for (name, front), colour in zip(fronts.items(), ("#0072B2", "#009E73", "#D55E00"), strict=True):
    line = {"ls": styles[name]} if styles[name] != "o" else {"ls": "", "marker": "o", "ms": 3}
    axes[0].plot(*(front.rewards.T - bandit.beta * front.kl), color=colour, label=name, **line)
    axes[1].plot(share, front.kl, color=colour, **line)
    axes[2].plot(share, front.regret, color=colour, **line)
axes[0].set(xlabel="E[R₁] − β·KL", ylabel="E[R₂] − β·KL", title="Pareto front by weights")
axes[1].set(xlabel="w₁", title="KL(π‖π_ref), nats")
axes[2].set(xlabel="w₁", title="regret for the weighted sum")
axes[0].legend(frameon=False, fontsize=7)
plt.show()

# %% [markdown]
# ## 3. Few and noisy data, and combinations that are no sum
# CoPG's fit of given pairs is linear in their reward gaps. So fits of two rewards on the **same** pairs add to the fit of the sum, however few
# and noisy the pairs are. The optimum of min(R₁, R₂) is no interpolation at any weight, and wants a run of its own.


# %%
def fit(key, values):
    """ln π of CoPG's fit of 100 pairs from μ, for each of these rewards, whose gaps come with noise."""
    first, second = jax.random.categorical(key, jnp.log(bandit.mu1), shape=(2, 100))
    noise = 0.5 * jax.random.normal(jax.random.fold_in(key, 1), (len(rewards), 100))
    met = jnp.zeros((num_arms, num_arms)).at[first, second].add(1.0)
    gaps = values(rewards[:, first] - rewards[:, second] + noise)
    pull = jnp.zeros((len(gaps), num_arms)).at[:, first].add(gaps).at[:, second].add(-gaps)
    ratio = jax.vmap(exact.copg_maximiser, (None, 0, None))(met + met.T, pull, bandit.beta)
    return jax.nn.log_softmax(jnp.log(bandit.ref)[None] + ratio)


half = jnp.array([0.5, 0.5])
of_sum = several.weigh_rewards(rewards, half, bandit)


def regrets(key):
    """Of the fit of the sum; of both fits on its pairs, joined; of fits on pairs of their own, joined."""
    other = jax.random.fold_in(key, 2)
    alone = fit(key, lambda gaps: half[None] @ gaps)[0]
    same = fit(key, lambda gaps: gaps)
    own = jnp.stack([same[0], fit(other, lambda gaps: gaps)[1]])
    joined = [several.interpolate_logits(pair, half, bandit) for pair in (same, own)]
    return jnp.stack([exact.regret(policy, of_sum) for policy in (alone, *joined)])


found = jax.jit(jax.vmap(regrets))(jax.random.split(jax.random.key(0), 2000))
names = ("one run for the sum", "two runs on the same pairs", "two runs on pairs of their own")
for name, values in zip(names, np.asarray(found).T, strict=True):
    print(f"{name:32s} regret {values.mean():.4f} ± {values.std() / np.sqrt(len(values)):.4f}")
least = exact.optimal_policy(bandit._replace(reward=rewards.min(0)))
gaps = jax.vmap(exact.total_variation, (0, None))(joined, least)
print(
    f"min(R₁, R₂): total variation to the nearest interpolation {gaps.min():.3f}, at w₁ = {share[gaps.argmin()]:.2f}"
)

# %% [markdown]
# One run a reward is enough for every weighted sum, in the tabular case and at one β: nothing is lost, also on few pairs. What is lost by mixing
# answers is above. All this adds *logits*, which costs one forward pass a reward for each token that is generated; to add the *parameters* of two
# language models is another thing, and sums of next-token logits are sums of the logits of whole answers only up to the normalisers of the prefixes.

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
# # Contrastive Policy Gradient, exactly
#
# CoPG (arXiv 2406.19185) maximises $J(\pi)=\mathbb E_\pi[R]-\beta\,\mathrm{KL}(\pi\|\pi_{\mathrm{ref}})$ from pairs
# that *any* policy sampled. On a bandit nothing has to be estimated: each claim below is a derivation, a call into
# `copg_jax`, and a number. Nothing is defined here; every formula lives in the package and is tested there.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from copg_jax.bandit import exact, population, sequences, train
from experiments.studies import ablations, instability, off_policy, regret_figure

jax.config.update("jax_enable_x64", True)
# %config InlineBackend.figure_formats = ["png"]
plt.rcParams.update({"figure.dpi": 90, "font.size": 9, "axes.grid": True, "grid.alpha": 0.25})
np.set_printoptions(precision=5, suppress=True)
bandit = train.bandit_from_config(train.BanditConfig())
uniform = jnp.log(bandit.ref)
bandit

# %% [markdown]
# ## 1. The problem and its solution
# Three arms, rewards (2.5, 2, 1), uniform reference, β = ½. The maximiser of $J$ is
# $\pi_*\propto\pi_{\mathrm{ref}}\,e^{R/\beta}$ (Eq. 12), its value the free energy $\beta\ln Z_*$, and the regret of
# any other policy is $\beta\,\mathrm{KL}(\pi\|\pi_*)$.

# %%
best = exact.optimal_policy(bandit)
print("π*              ", jnp.exp(best))
print(f"J(π*)            {exact.optimal_value(bandit):.5f}")
print(f"regret of uniform {exact.regret(uniform, bandit):.5f}")

# %% [markdown]
# ## 2. The objective is a least-squares fit
# For one pair, with $\Delta$ the gap of log-ratios and $\Delta R$ that of rewards, Eq. (5) is
# $\ell=\Delta R\,\Delta-\tfrac\beta2\Delta^2$. Complete the square (Eq. 15):
# $$\beta\,\ell=\tfrac12\Delta R^2-\tfrac12(\Delta R-\beta\Delta)^2 .$$
# *A slip in print:* Eq. (14) wants $\beta\ln(\pi/\pi_{\mathrm{ref}})=V-\beta\ln\sum\pi_{\mathrm{ref}}e^{V/\beta}$; the
# paper's $Z_V$ loses the 1/β, and line (a) of (15) mixes $Z$ with $\ln Z$. Either way it cancels in the gaps, which is
# why CoPG never needs a normaliser. So $L$ is maximal exactly where βΔ = ΔR on every pair that can be drawn.

# %%
policy = jax.nn.log_softmax(jnp.array([0.3, -1.0, 0.4]))
print(f"L by pairs, Eq. (6):    {exact.copg_population_objective(policy, bandit):.15f}")
print(f"L by squares, Eq. (15): {exact.copg_square_form(policy, bandit):.15f}")

# %% [markdown]
# ## 3. Theorem 1: the maximiser is π*, from every start, and the only one
# In the logits $L$ is a quadratic with Hessian −β times the Laplacian of the graph "which arms meet in a pair". One zero
# eigenvalue is the harmless shift of all logits; Theorem 1's equal supports make every other one positive.

# %%
ascend = jax.jit(
    lambda z: population.fixed_point(lambda y: population.direction("copg", y, bandit), z)
)
for start in 3 * jax.random.normal(jax.random.key(0), (3, 3)):
    print(
        start,
        "→",
        jnp.exp(ascend(start)),
        f"TV to π*: {exact.total_variation(ascend(start), best):.0e}",
    )
weights = exact.pair_weights(bandit.mu1, bandit.mu2)
print("curvatures", bandit.beta * jnp.linalg.eigvalsh(exact.pair_laplacian(weights)))

# %% [markdown]
# **When the assumption breaks.** Suppose arm 0 is never drawn. $L$ becomes flat along its logit, the end depends on the
# start, and the code sees it in two ways: `make_bandit` refuses a zero probability, and `pair_components` numbers the
# sets of arms that pairs connect (more than one: undetermined). Equal supports are sufficient, not necessary: what
# matters is that the graph is connected, as in the last line, where the supports of μ1 and μ2 are even disjoint.

# %%
for mu1, mu2 in [([0.0, 0.3, 0.7], [0.0, 0.1, 0.9]), ([0.5, 0.5, 0.0], [0.0, 0.0, 1.0])]:
    broken = bandit._replace(mu1=jnp.array(mu1), mu2=jnp.array(mu2))
    sets = exact.pair_components(exact.pair_weights(broken.mu1, broken.mu2))
    find = jax.jit(
        lambda z, b: population.fixed_point(lambda y: population.direction("copg", y, b), z)
    )
    ends = [find(jnp.array([z, 0.0, 0.0]), broken) for z in (-2.0, 0.0)]
    print(
        f"μ1={mu1} μ2={mu2}: sets {sets}, regret from two starts",
        [f"{exact.regret(e, broken):.4f}" for e in ends],
    )
try:
    exact.make_bandit([2.5, 2.0, 1.0], mu1=[0.0, 0.3, 0.7], mu2=[0.1, 0.1, 0.8], beta=0.5)
except ValueError as error:
    print(error)

# %% [markdown]
# ## 4. The gradient is a policy gradient with *the* baseline
# Eq. (7): $\nabla L=\mathbb E_{\mu_1}[(R^\pi_\beta-\mathbb E_{\mu_2}R^\pi_\beta)\nabla\ln\pi]+(1\leftrightarrow2)$. On
# policy any baseline would do, and the expectation is $2\nabla J$ (Property 1). Off policy the baseline decides where
# training ends. The weight $R^\pi_{\beta/2}$ of Eq. (5) must be differentiated too; stop its gradient and the
# temperature is exactly halved.

# %%
logits = jnp.array([0.3, -1.0, 0.4])
closed = population.direction("copg", logits, bandit)
autodiff = jax.grad(lambda z: exact.copg_population_objective(jax.nn.log_softmax(z), bandit))(
    logits
)
print("Eq. (7)  ", closed, "\nautodiff ", autodiff)
on_policy = bandit._replace(mu1=jnp.exp(policy), mu2=jnp.exp(policy))
print(
    "Property 1: E_ππ[∇ℓ] / ∇J =",
    population.direction("copg", logits, on_policy)
    / population.logit_gradient(population.rl_gradient(policy, bandit), policy, bandit),
)
half = bandit._replace(beta=bandit.beta / 2)
print(
    "gradient stopped in the weight: ends at",
    jnp.exp(population.fixed_point(lambda z: population.direction("copg", z, half), logits)),
    "= π* of β/2",
)

# %% [markdown]
# **Property 2**: the coefficients of RLOO-k are those of CoPG-k. **Property 3**: with R = ±¼ they are −1/(2β) those of
# IPO (the printed right-hand side lacks a ∇). Both are tested to 1e-12 in `tests/bandit/test_properties.py`. Wrong
# baselines and binarised rewards move the fixed point:

# %%
print("algorithm   ends at                       regret    slowest rate")
for name in population.GRADIENTS:
    follow = lambda z, name=name: population.direction(name, z, bandit)
    end = jax.jit(lambda z, follow=follow: population.fixed_point(follow, z))(uniform)
    print(
        f"{name:10s} {np.asarray(jnp.exp(end))}  {abs(exact.regret(end, bandit)):8.5f}"
        f"  {population.flow_spectrum(follow, end)[-1]:8.4f}"
    )

# %% [markdown]
# DPO ends at π* because these preferences *are* Bradley–Terry in $R$ at unit scale. IPO fits σ(ΔR) − ½ instead of ΔR.
#
# ## 5. Beyond a bandit: sequences
# A tiny autoregressive policy over 3 tokens (EOS among them), at most 4 long: 31 completions. Its log-probabilities go
# through `logprobs.py`, its objective through `losses.py`: the code that trains Llama. Gradient ascent on $L$ over the
# table of conditionals finds the sequence-level π*.

# %%
completions = sequences.enumerate_completions(3, 4)
features = jnp.asarray(sequences.prefix_features(completions, 3, shared=False))[None]
rng = np.random.default_rng(0)
mu1, mu2 = rng.dirichlet(np.full(31, 2.0), size=(2, 1))
table = jnp.zeros((features.shape[-1], 3), jnp.float32)
logp = lambda t: sequences.completion_logp(t, features, completions).astype(float)
start = jnp.exp(logp(table))
sequence_bandit = exact.make_bandit(
    rng.normal(size=(1, 31)), mu1=mu1, mu2=mu2, ref=start / start.sum(), beta=0.7
)
slope = jax.grad(lambda t: exact.copg_population_objective(logp(t), sequence_bandit))
table = jax.jit(lambda t: jax.lax.fori_loop(0, 20_000, lambda _, t: t + 2.0 * slope(t), t))(table)
target = exact.optimal_policy(sequence_bandit)
print(
    f"TV to the sequence-level π*: start {exact.total_variation(jnp.log(start), target):.3f}, end {exact.total_variation(logp(table), target):.0e}"
)

# %% [markdown]
# ## 6. Figure 1
# The paper's setting: 10⁴ pairs, Adam 1e-3, batch 512, 100 epochs (1,900 steps: an epoch drops its incomplete batch, and
# the paper's axis ends before 2,000). Here 16 seeds, then the same runs continued tenfold;
# `python -m experiments.bandit` does 64. What agrees: no baseline makes it worse than π_ref; IPO flattens at a biased
# solution; CoPG falls towards zero. What the paper's horizon cannot show: at step 1,900 CoPG is still falling, and PG
# with the value baseline is above *its own* end as well. Continued, CoPG reaches zero to rounding (the rewards are
# noise-free, so 10⁴ pairs determine π*), PG with the value baseline *passes* π* and leaves it again for its biased end,
# and DPO stops at the noise of its labels.

# %%
config = train.BanditConfig(num_seeds=16)
long_config = train.BanditConfig(num_seeds=4, num_pairs=10_000, num_epochs=600)
algorithms = tuple(train.OBJECTIVES)
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for ax, c, log in zip(axes, (config, long_config), (False, True), strict=True):
    regret = np.asarray(
        jax.jit(jax.vmap(train.make_train(c)))(jax.random.split(jax.random.key(0), c.num_seeds))
    )
    regret_figure.draw_regret(ax, np.maximum(regret, 1e-12), algorithms, log=log)
    print(
        regret.shape[1] - 1,
        "steps:",
        {n: float(f"{r:.4f}") for n, r in zip(algorithms, regret[:, -1].mean(0), strict=True)},
    )
axes[1].set(ylim=(1e-6, 1), xlim=(10, None))
axes[1].legend(frameon=False, loc="lower left")
plt.show()

# %% [markdown]
# ## 7. Ablations
# ### 7.1 β over two decades, against the optimum of the *same* β
# Left: population ends. CoPG is exact at every β. Right: figure 1's training budget. At low β *every* algorithm is far
# from its end, not because anything is unstable: the optimum is ΔR/β nats away, and Adam at 1e-3 walks at most
# 1.9 nats of logit in 1,900 steps.

# %%
betas = jnp.geomspace(0.02, 2.0, 7)
names = ("copg", "pg_value", "ipo", "dpo")
ends = {
    name: jax.jit(
        jax.vmap(
            lambda b, name=name: exact.regret(
                population.fixed_point(
                    lambda z: population.direction(name, z, bandit._replace(beta=b)), uniform
                ),
                bandit._replace(beta=b),
            )
        )
    )(betas)
    for name in names[:3]
}
trained = ablations.trained_regret(
    jax.random.key(1), bandit, betas, algorithms=names, num_seeds=4
).mean(1)
start = jax.vmap(lambda b: exact.regret(uniform, bandit._replace(beta=b)))(betas)
fig, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
for i, name in enumerate(names):
    style = {
        "color": regret_figure.COLOURS[name],
        "linestyle": regret_figure.STYLES[name],
        "label": regret_figure.LABELS[name],
    }
    if name in ends:
        axes[0].loglog(betas, jnp.maximum(ends[name], 1e-6), **style)
    axes[1].loglog(betas, jnp.maximum(trained[:, i], 1e-6), **style)
axes[1].loglog(betas, start, color="0.5", lw=1, label="π_ref")
axes[0].set(title="fixed point", xlabel="β", ylabel="regret (floor 1e-6)")
axes[1].set(title="after 1,900 steps", xlabel="β")
axes[1].legend(frameon=False)
plt.show()
print(
    "β", betas, "\nCoPG trained", trained[:, 0], "\nsame / regret of π_ref", trained[:, 0] / start
)

# %% [markdown]
# ### 7.2 Size of the data set, and reward noise
# The empirical maximiser is a linear solve, so finite data can be studied without an optimiser. Without noise the regret
# is *zero* as soon as the pairs connect the arms; with noise of standard deviation σ on each reward it follows
# $\frac{\sigma^2}{n\beta}\,\mathrm{tr}(F_*\,\mathcal L^+)$, with $F_*$ the Fisher matrix of π* and $\mathcal L$ the
# Laplacian of the pairs: one formula for n, σ, β and μ. IPO has a floor that no data removes.

# %%
rng = np.random.default_rng(0)
sizes = [10, 30, 100, 300, 1000, 3000, 10_000]
fig, ax = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
print("   n  connected  noise-free | connected   σ=0.5   law      σ=1.0   law     IPO")
table_rows = []
for n in sizes:
    clean = ablations.finite_data_regret(rng, bandit, n)
    noisy = [
        ablations.finite_data_regret(rng, bandit, n, reward_noise=s)["copg"].mean()
        for s in (0.5, 1.0)
    ]
    law = [float(ablations.predicted_regret(bandit, n, reward_noise=s)) for s in (0.5, 1.0)]
    held = np.abs(clean["copg"][clean["connected"]]).max()
    table_rows.append((*noisy, clean["ipo"].mean()))
    print(
        f"{n:6d}  {clean['connected'].mean():.3f}     {held:.0e}            {noisy[0]:.5f} {law[0]:.5f}  {noisy[1]:.5f} {law[1]:.5f}  {clean['ipo'].mean():.4f}"
    )
half_noise, full_noise, ipo = np.array(table_rows).T
ax.loglog(sizes, half_noise, "o", color="#56B4E9", label="CoPG, σ = 0.5")
ax.loglog(sizes, full_noise, "s", color="#0072B2", label="CoPG, σ = 1")
for s in (0.5, 1.0):
    ax.loglog(
        sizes,
        [ablations.predicted_regret(bandit, n, reward_noise=s) for n in sizes],
        color="0.4",
        lw=1,
    )
ax.loglog(sizes, ipo, "^--", color=regret_figure.COLOURS["ipo"], label="IPO, labels sampled")
ax.set(xlabel="pairs n", ylabel="mean regret", title="grey: the law")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ### 7.3 Heterogeneous or equal μ, and how far off policy
# The law ranks samplers: only the Laplacian depends on them. Contrasting two different samplers (μ1 ≠ μ2) instead of
# drawing both from their mixture hardly matters here (0.5 % and 4 % by the law, below what 1,000 data sets resolve);
# *which* arms meet does, by a factor of 3, and sampling from π* itself is not the best. Distance from π* costs
# continuously, as $\mathrm{tr}(F_*\mathcal L^+)$ grows with the rarity of what π* wants compared; the cliff comes where arms
# go missing from the data (here beyond 4 nats): there even noise-free rewards leave regret, and the law no longer holds.

# %%
mixture = 0.5 * (bandit.mu1 + bandit.mu2)
good, bad = jnp.array([0.6, 0.35, 0.05]), jnp.array([0.05, 0.05, 0.9])
choices = {
    "paper's μ1, μ2": bandit,
    "both from their mixture": bandit._replace(mu1=mixture, mu2=mixture),
    "good and poor data": bandit._replace(mu1=good, mu2=bad),
    "both from that mixture": bandit._replace(mu1=0.5 * (good + bad), mu2=0.5 * (good + bad)),
    "uniform": ablations.tilted_sampler(bandit, 1.0),
    "on policy (π*)": ablations.tilted_sampler(bandit, 0.0),
}
print("sampler                     slowest rate   regret n=1000 σ=1   law")
for name, choice in choices.items():
    rate = (
        bandit.beta
        * jnp.linalg.eigvalsh(exact.pair_laplacian(exact.pair_weights(choice.mu1, choice.mu2)))[1]
    )
    measured = ablations.finite_data_regret(rng, choice, 1000, reward_noise=1.0)["copg"].mean()
    print(
        f"{name:26s}  {rate:10.4f}   {measured:12.5f}     {ablations.predicted_regret(choice, 1000, reward_noise=1.0):10.5f}"
    )
tilts = np.linspace(0, 4, 9)
rows = []
for tilt in tilts:
    tilted = ablations.tilted_sampler(bandit, tilt)
    distance = (jnp.exp(best) * (best - jnp.log(tilted.mu1))).sum()
    result = ablations.finite_data_regret(rng, tilted, 1000, reward_noise=1.0)
    clean = ablations.finite_data_regret(rng, tilted, 1000)
    rows.append(
        (
            float(distance),
            result["copg"].mean(),
            clean["copg"].mean(),
            result["connected"].mean(),
            float(ablations.predicted_regret(tilted, 1000, reward_noise=1.0)),
        )
    )
rows = np.array(rows)
print("KL(π*‖μ), regret σ=1, regret σ=0, connected, law\n", rows)
fig, ax = plt.subplots(figsize=(5.5, 3), layout="constrained")
ax.semilogy(rows[:, 0], rows[:, 1], "o-", color="#0072B2", label="σ = 1")
ax.semilogy(
    rows[:, 0],
    np.maximum(rows[:, 2], 1e-6),
    "s--",
    color="#E69F00",
    label="noise-free (floor 1e-6)",
)
ax.semilogy(rows[:, 0], rows[:, 4], color="0.4", lw=1, label="law")
ax.axhline(float(exact.regret(uniform, bandit)), color="0.7", lw=1)
ax.set(xlabel="KL(π*‖μ), nats", ylabel="mean regret, n = 1,000")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ### 7.4 One sample or many for the inner expectation
# At a fixed budget of scored samples, groups of k use them better: each sample's baseline has variance σ²/(k − 1), so the
# regret is k/(2(k − 1)) of that of pairs: a factor of 2 in the limit, most of it by k = 4.

# %%
equal = ablations.tilted_sampler(bandit, 1.0)
print(" k   measured   law")
ks, measured, laws = (2, 3, 4, 6, 12), [], []
for k in ks:
    measured.append(
        ablations.group_regret(
            rng, equal, num_samples=1200, k=k, reward_noise=1.0, num_sets=1000
        ).mean()
    )
    laws.append(float(ablations.predicted_regret(equal, 600, reward_noise=1.0)) * k / (2 * (k - 1)))
    print(f"{k:2d}   {measured[-1]:.5f}   {laws[-1]:.5f}")
fig, ax = plt.subplots(figsize=(4.5, 2.6), layout="constrained")
ax.plot(ks, measured, "o", color="#0072B2", label="1,200 samples, σ = 1")
ax.plot(ks, laws, color="0.4", lw=1, label="law")
ax.set(xlabel="k", ylabel="mean regret", ylim=(0, None))
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 8. Why is low β unstable? (open question 1)
# The paper sees generation rewards drop at low β while the validation loss shows nothing. Three suspects.
#
# **Curvature? No.** The Hessian is β times a Laplacian, so the largest stable step of gradient descent is ∝ 1/β: low β is
# the *safe* side, and just above the limit it diverges, just below it does not.

# %%
for beta in (0.05, 0.5, 5.0):
    problem = bandit._replace(beta=jnp.asarray(beta))
    limit = instability.largest_stable_step(problem)
    follow = jax.jit(
        lambda step, b=problem: jax.lax.fori_loop(
            0, 3000, lambda _, z: z + step * population.direction("copg", z, b), uniform
        )
    )
    spans = [float(jnp.ptp(follow(factor * limit))) for factor in (0.99, 1.01)]
    print(
        f"β={beta:4}: largest stable step {limit:8.3f};  logit span after 3,000 steps: ×0.99 {spans[0]:.2f}, ×1.01 {spans[1]:.1e}"
    )

# %% [markdown]
# **Gradient noise or finite data? Not by themselves.** With noise-free rewards every pair has the *same* optimum, so the
# gradient noise vanishes there (7.2: zero regret from finite data). Noisy rewards cost σ²/(nβ) times a trace, and that
# trace vanishes with β, for π* becomes one arm: what is left is the chance of a wrong *order*, about the same at all low β.

# %%
for beta in (0.02, 0.05, 0.1, 0.3, 1.0):
    problem = bandit._replace(beta=jnp.asarray(beta))
    result = ablations.finite_data_regret(rng, problem, 300, reward_noise=1.0)
    print(
        f"β={beta:5}: regret n=300 σ=1 {result['copg'].mean():.4f}, law {ablations.predicted_regret(problem, 300, reward_noise=1.0):.4f}, "
        f"regret of π_ref {exact.regret(uniform, problem):.3f}"
    )

# %% [markdown]
# **Generalisation: yes.** Give 512 arms to a log-linear policy with 12 parameters, and 1,000 pairs from a peaked π_ref.
# CoPG is then a regression of ΔR on βΔ: *every β fits the same implicit reward* $V=\beta\lambda$, and
# $\pi\propto\pi_{\mathrm{ref}}e^{V/\beta}$ seeks out the largest errors of that fit, the more sharply the lower β. Two kinds
# of misfit: unsystematic (left), and a reward that saturates and then falls away from the data (right), as when a summary
# can only be so short. The residual on held-out pairs from π_ref, i.e. the validation loss, is *identical* for all β.

# %%
betas = jnp.geomspace(0.01, 3.0, 7)
kinds = {"unsystematic misfit": (1.0, 0.0), "reward saturates": (0.5, 0.7)}


def study(key, misfit, saturation):
    """Rewards and KL of each remedy, over β, on one random problem."""
    keys = jax.random.split(key, 4)
    problem = instability.make_problem(keys[0], misfit=misfit, saturation=saturation)
    problem = problem._replace(log_ref=jax.nn.log_softmax(0.5 * problem.log_ref))
    arms = instability.sample_arms(keys[1], problem.log_ref, 1000)
    held_out = instability.sample_arms(keys[2], problem.log_ref, 2000)
    fits = {
        "CoPG": lambda b: instability.least_squares(problem, arms, b),
        "ΔR / rms": lambda b: instability.least_squares(
            problem, arms, b, instability.normalise(problem.reward[arms], "batch")
        ),
        "ΔR / |ΔR|": lambda b: instability.least_squares(
            problem, arms, b, instability.normalise(problem.reward[arms], "pair")
        ),
        "CoPG + fresh pairs": lambda b: instability.refreshed(
            keys[3], problem, arms, b, rounds=4, num_pairs=250
        ),
    }
    measure = lambda fit: jax.lax.map(
        lambda b: instability.measure(fit(b), problem, held_out, b), betas
    )
    return {name: measure(fit) for name, fit in fits.items()}


styles = {
    "CoPG": ("#0072B2", "o-"),
    "ΔR / rms": ("#56B4E9", "x:"),
    "ΔR / |ΔR|": ("#009E73", "^--"),
    "CoPG + fresh pairs": ("#D55E00", "s-."),
}
fig, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
run_study = jax.jit(jax.vmap(study, (0, None, None)))
for column, (title, (misfit, saturation)) in enumerate(kinds.items()):
    results = jax.tree.map(
        lambda x: np.asarray(x.mean(0)),
        run_study(jax.random.split(jax.random.key(0), 12), misfit, saturation),
    )
    print(title, "\n  β          ", np.asarray(betas))
    for name, r in results.items():
        colour, mark = styles[name]
        axes[0, column].semilogx(betas, r["reward"], mark, color=colour, label=name)
        axes[1, column].plot(r["kl"], r["reward"], mark, color=colour)
        print(f"  {name:18s} reward {r['reward']}  KL {r['kl']}")
    print("  held-out residual of CoPG", results["CoPG"]["residual"])
    axes[0, column].set(title=title, xlabel="β", ylabel="E_π[R]")
    axes[1, column].set(xlabel="KL(π‖π_ref), nats", ylabel="E_π[R]")
axes[0, 0].legend(frameon=False)
plt.show()

# %% [markdown]
# **Does a normalisation of ΔR help?** Dividing by a scale s is exactly β → βs (the invariance R→cR ⇔ β→cβ): the curves
# over β shift sideways and the curves over KL (below) coincide. It makes β portable between reward models, no more. Dividing
# by |ΔR|, pair by pair, is IPO: another fit. What moves the frontier is data where the policy *goes*: a few rounds of fresh
# pairs, which Theorem 1 allows without any correction; but at the lowest β even they come too late, since fresh pairs from
# a collapsed policy compare an arm with itself.
#
# **Along training**, stochastic steps show the paper's picture: at low β the reward of generations first rises, then falls,
# while the held-out loss only improves.

# %%
few = jnp.array([0.03, 0.3, 1.0])


def train_one(key, beta):
    """Measurements along stochastic training on one random problem whose reward saturates."""
    keys = jax.random.split(key, 4)
    problem = instability.make_problem(keys[0], misfit=0.5, saturation=0.7)
    problem = problem._replace(log_ref=jax.nn.log_softmax(0.5 * problem.log_ref))
    arms = instability.sample_arms(keys[1], problem.log_ref, 1000)
    held_out = instability.sample_arms(keys[2], problem.log_ref, 2000)
    path = instability.fit(keys[3], problem, arms, beta)
    return jax.vmap(lambda theta: instability.measure(theta, problem, held_out, beta))(path)


over_problems = jax.vmap(train_one, (0, None))
paths = jax.jit(jax.vmap(over_problems, (None, 0)))(jax.random.split(jax.random.key(0), 12), few)
values = {name: np.asarray(v.mean(1)) for name, v in paths.items()}
fig, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
titles = {"reward": "E_π[R]", "residual": "held-out residual", "kl": "KL(π‖π_ref), nats"}
for ax, (name, title) in zip(axes, titles.items(), strict=True):
    for i, colour in enumerate(("#D55E00", "#0072B2", "#009E73")):
        steps = 100 * np.arange(values[name].shape[1])
        ax.plot(
            steps, values[name][i], color=colour, ls=("-", "--", "-.")[i], label=f"β = {few[i]:g}"
        )
    ax.set(title=title, xlabel="Adam steps, batch 64")
axes[0].legend(frameon=False)
plt.show()
reward = values["reward"]
print("β:", np.asarray(few), "\npeak reward", reward.max(1), "at step", 100 * reward.argmax(1))
print("final reward", reward[:, -1], "\nfinal held-out residual", values["residual"][:, -1])

# %% [markdown]
# ## 9. Which losses are right off-policy?
# Several papers regress the reward on the log-ratio instead of fitting gaps, with some baseline $b$:
# $$\tfrac12\sum_i(R_i-b-\beta\lambda_i)^2=\tfrac12\sum_i\big((R_i-\bar R)-\beta(\lambda_i-\bar\lambda)\big)^2
# +\tfrac k2\,(\bar R-b-\beta\bar\lambda)^2 .$$
# The first part is CoPG of k, up to a constant and a factor; the best $b$ leaves it alone. GVPO, TBA (VarGrad), REBEL, RPO
# with squares and Command A's loss are that first part (`tests/test_relatives.py` writes each down and compares). The second
# part says where the *mean* log-ratio should be. It is right where $b=\beta\ln\mathbb E_{\pi_{\mathrm{ref}}}e^{R/\beta}$, which
# data from another μ do not give. The expected gradient is that of an off-policy policy gradient with the baseline $b$, so
# section 4 applies: off policy the baseline decides where training ends.
#
# AsymRE lowers the baseline of CoPG by |δV|, which adds maximum likelihood of the data; TOPR weighs what is worse than its
# zero by min(π/μ, 1) and has no KL at all. Total variation to π*, for both arms of a pair from μ:

# %%
samplers = {
    "μ = π_ref": bandit.ref,
    "μ = (0.1, 0.2, 0.7)": bandit.mu1,
}
print("                               ", *samplers)
columns = [off_policy.distances(off_policy.sampled_from(mu, bandit)) for mu in samplers.values()]
for name in off_policy.ENDS:
    print(f"{name:32s}", *(f"{column[name]:8.3f}" for column in columns))
print("on groups of k:")
problems = [off_policy.sampled_from(mu, bandit) for mu in samplers.values()]
for name in off_policy.GROUP_LOSSES:
    for k in (2, 8):
        values = off_policy.group_distances(name, problems, k)
        print(f"{name:29s} {k:2d}", *(f"{value:8.3f}" for value in values))
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
off_policy.draw(axes, bandit)
plt.show()

# %% [markdown]
# CoPG is at zero for every μ and every k. The mean reward is a wrong $b$ even for data from π_ref. The value of π_ref is the
# right one there, but not from groups of two, whose logarithm of a mean is too low on average, nor from other data; from
# π* itself (t = 0) it is too high, and the flow from π_ref ends at a second fixed point. The bias of AsymRE is that of its
# δV. Without a KL, TOPR does not know π*: from good data it ends at the best arm.

"""The objectives against literal formulas and recorded numbers, their invariances and maximum.

1. values: the paper's formulas pair by pair in NumPy, recorded numbers, TRL's formulas as a peer;
2. invariances and the maximum;
3. behaviour as array functions: shapes, jit, vmap, float32, extreme inputs.

Gradients, masks and traps have files of their own.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax import losses

BETA = 0.4

EAGER = {
    "copg": lambda x, r: losses.copg_objective(x, r, beta=BETA),
    "copg_loss": lambda x, r: losses.copg_loss(x, r, beta=BETA),
    "dpo": lambda x, r: losses.dpo_loss(x, r, beta=BETA),
    "ipo": lambda x, r: losses.ipo_loss(x, r, beta=BETA),
    "pg": lambda x, r: losses.pg_objective(x, r, beta=BETA, baseline=0.3),
    "rloo": lambda x, r: losses.rloo_objective(x, r, beta=BETA),
    "bradley_terry": losses.bradley_terry_loss,
    "nll": lambda x, r: losses.nll_loss(x),
}
LOSSES = {name: jax.jit(fn) for name, fn in EAGER.items()}  # one compilation per shape: faster
CONTRASTIVE = ["copg", "dpo", "ipo", "rloo", "bradley_terry"]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def random_groups(k: int, *, batch: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, k])
    return rng.normal(size=(batch, k)) * 2, rng.normal(size=(batch, k))


@functools.cache
def slope(fn):
    return jax.jit(jax.grad(lambda x, r: fn(x, r).sum()))


def grad(fn, log_ratio, reward):
    """Gradient of the sum over groups with respect to the log-ratios."""
    return slope(fn)(log_ratio, reward)


def eq5(log_ratio, reward, beta):
    """Eq. (5) for one pair, as printed."""
    regularized = [reward[i] - beta / 2 * log_ratio[i] for i in (0, 1)]
    return (regularized[0] - regularized[1]) * log_ratio[0] + (
        regularized[1] - regularized[0]
    ) * log_ratio[1]


def mean_over_preferences(gap_loss, score, reward):
    gaps = [
        score[i] - score[j]
        for i, j in itertools.permutations(range(len(score)), 2)
        if reward[i] > reward[j]
    ]
    return np.mean([gap_loss(gap) for gap in gaps]) if gaps else 0.0


def softplus(x):
    return np.logaddexp(0.0, x)


# --- 1. values ---


def test_copg_of_a_pair_is_equation_5(float64):
    log_ratio, reward = random_groups(2)
    expected = [eq5(*group, BETA) for group in zip(log_ratio, reward, strict=True)]
    got = losses.copg_objective(jnp.asarray(log_ratio), jnp.asarray(reward), beta=BETA)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_copg_of_a_group_is_the_sum_over_pairs_divided_by_k_minus_1(k, float64):
    log_ratio, reward = random_groups(k)
    expected = [
        sum(eq5(x[[i, j]], r[[i, j]], BETA) for i, j in itertools.combinations(range(k), 2))
        / (k - 1)
        for x, r in zip(log_ratio, reward, strict=True)
    ]
    x, r = jnp.asarray(log_ratio), jnp.asarray(reward)
    np.testing.assert_allclose(losses.copg_objective(x, r, beta=BETA), expected, rtol=1e-11)
    np.testing.assert_array_equal(
        losses.copg_loss(x, r, beta=BETA), -losses.copg_objective(x, r, beta=BETA)
    )


ORIGINS = [[0, 1], [0, 1, 1], [0, 0, 7, 7], [2, 0, 1, 2, 2], [3, 3, 3, 5, 0]]


@pytest.mark.parametrize("origin", ORIGINS, ids=str)
def test_cross_copg_is_the_mean_over_pairs_of_different_origins_times_half_of_k(origin, float64):
    k = len(origin)
    log_ratio, reward = random_groups(k)
    pairs = [(i, j) for i, j in itertools.combinations(range(k), 2) if origin[i] != origin[j]]
    expected = [
        k / 2 * np.mean([eq5(x[[i, j]], r[[i, j]], BETA) for i, j in pairs])
        for x, r in zip(log_ratio, reward, strict=True)
    ]
    x, r = jnp.asarray(log_ratio), jnp.asarray(reward)
    numbers = {"beta": BETA, "origin": jnp.broadcast_to(jnp.array(origin, jnp.int8), x.shape)}
    np.testing.assert_allclose(losses.cross_copg_objective(x, r, **numbers), expected, rtol=1e-11)
    np.testing.assert_array_equal(
        losses.cross_copg_loss(x, r, **numbers), -losses.cross_copg_objective(x, r, **numbers)
    )
    if k > len(set(origin)):  # the wrong variant: all pairs
        assert np.abs(losses.copg_objective(x, r, beta=BETA) - np.array(expected)).min() > 1e-3


def test_cross_copg_equals_numbers_by_hand_and_of_two_origins_the_identity_of_squares(float64):
    # λ = (1, 0, −2), R = (3, 1, 2), β = ½, origins (0, 1, 1): the pairs (1, 2) and (1, 3).
    # ℓ = 2·1 − ¼·1 = 7/4 and 1·3 − ¼·9 = 3/4; their mean 5/4 times 3/2 is 15/8.
    x, r, origin = jnp.array([1.0, 0, -2]), jnp.array([3.0, 1, 2]), jnp.array([0, 1, 1])
    assert losses.cross_copg_objective(x, r, beta=0.5, origin=origin) == 1.875
    # Σ(d_i − d_j)² = n_B Σ_A d² + n_A Σ_B d² − 2 S_A S_B: the gaps of R = λ and β = 0.
    d = np.random.default_rng(0).normal(size=5)
    first, second = d[:2], d[2:]
    squares = 3 * (first**2).sum() + 2 * (second**2).sum() - 2 * first.sum() * second.sum()
    got = losses.cross_copg_objective(
        jnp.asarray(d), jnp.asarray(d), beta=0.0, origin=jnp.array([0, 0, 1, 1, 1])
    )
    np.testing.assert_allclose(got, 5 / 2 * squares / 6, rtol=1e-12)


def test_groups_with_a_pair_across_origins_are_marked():
    origin = jnp.array([[0, 0, 1], [2, 2, 2], [0, 1, 1], [0, 0, 1]])
    mask = jnp.array([[1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 1, 0]], bool)
    got = losses.has_cross_pair(jnp.zeros((4, 3)), mask, origin=origin)
    np.testing.assert_array_equal(got, [True, False, False, False])
    assert losses.has_cross_pair(jnp.zeros((4, 3)), origin=origin)[2]


def test_copg_needs_no_array_of_pairs():
    k = 512
    x, origin = jnp.zeros((1, k)), jnp.zeros((1, k), jnp.int8)
    for objective in (
        losses.copg_objective,
        functools.partial(losses.cross_copg_objective, origin=origin),
    ):
        run = jax.grad(lambda x, of=objective: of(x, x, beta=BETA).sum())
        assert f"{k},{k}" not in str(jax.make_jaxpr(run)(x))
    assert f"{k},{k}" in str(jax.make_jaxpr(lambda x: losses.ipo_loss(x, x, beta=BETA))(x))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_preference_losses_are_means_over_strictly_ordered_pairs(k, float64):
    log_ratio, reward = random_groups(k)
    reward[0, 1] = reward[0, 0]  # one tie among the pairs of the first group
    reward[1] = 0.0  # nothing but ties in the second
    gap_losses = {
        "dpo": lambda gap: softplus(-BETA * gap),
        "ipo": lambda gap: (0.5 - BETA * gap) ** 2,
        "bradley_terry": lambda gap: softplus(-gap),
    }
    for name, gap_loss in gap_losses.items():
        expected = [
            mean_over_preferences(gap_loss, *group) for group in zip(log_ratio, reward, strict=True)
        ]
        got = LOSSES[name](jnp.asarray(log_ratio), jnp.asarray(reward))
        np.testing.assert_allclose(got, expected, rtol=1e-12, err_msg=name)


def test_preferences_mark_strictly_ordered_pairs_only():
    marked = losses.preferences(jnp.array([2.0, 1.0, 2.0]))
    np.testing.assert_array_equal(marked, [[0, 1, 0], [0, 0, 0], [0, 1, 0]])
    marked = losses.preferences(jnp.array([2.0, 1.0, jnp.nan]), jnp.array([True, True, False]))
    np.testing.assert_array_equal(marked, [[0, 1, 0], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("name", ["copg", "rloo", "pg"])
def test_a_policy_loss_is_minus_its_objective(name, float64):
    x, r = map(jnp.asarray, random_groups(3))
    mask = jnp.asarray(np.random.default_rng(1).random((6, 3)) > 0.3)
    numbers = {"beta": BETA, "mask": mask} | ({"baseline": 0.3} if name == "pg" else {})
    loss, objective = (getattr(losses, f"{name}_{kind}") for kind in ("loss", "objective"))
    np.testing.assert_array_equal(loss(x, r, **numbers), -objective(x, r, **numbers))
    assert np.abs(loss(x, r, **numbers)).max() > 0.1


def test_groups_with_a_pair_and_with_a_preference_are_those_of_present_completions():
    reward = jnp.array([[2.0, 1.0, 2.0], [1.0, 1.0, 9.0], [3.0, 0.0, 9.0], [np.nan, 1.0, 2.0]])
    mask = jnp.array(
        [[True, True, True], [True, True, False], [True, False, False], [False, True, True]]
    )
    np.testing.assert_array_equal(losses.has_pair(reward, mask), [True, True, False, True])
    np.testing.assert_array_equal(losses.has_preference(reward, mask), [True, False, False, True])
    np.testing.assert_array_equal(losses.has_pair(reward[:, :1]), [False] * 4)
    np.testing.assert_array_equal(losses.has_preference(reward[:2]), [True, True])


def test_a_loss_carries_which_groups_count_in_its_average():
    by_order = {"dpo_loss", "ipo_loss", "bradley_terry_loss"}
    for name in ("copg_loss", "rloo_loss", "pg_loss", *by_order):
        wanted = losses.has_preference if name in by_order else losses.has_pair
        assert getattr(losses, name).counts is wanted


def test_values_equal_recorded_numbers():
    # By hand, λ = (1, 0, −2), R = (3, 1, 2), β = ½.
    # Pairs (Δ, ΔR): 12: (1, 2), 13: (3, 1), 23: (2, −1).  Eq. (5) = ΔR·Δ − Δ²/4:
    #   2 − ¼ = 7/4,  3 − 9/4 = 3/4,  −2 − 1 = −3;  their sum −½ over k − 1 = 2 is −¼.
    # Preferred gaps: 1 over 2: 1, 1 over 3: 3, 3 over 2: −2.
    #   IPO: (½ − ½)² = 0, (½ − 3/2)² = 1, (½ + 1)² = 9/4; mean 13/12.
    #   DPO: ln(1+e^−½) = 0.474076984, ln(1+e^−3/2) = 0.201413278, ln(1+e) = 1.313261688;
    #   mean 0.662917317.
    #   Bradley–Terry (λ read as scores): ln(1+e^−1) = 0.313261688, ln(1+e^−3) = 0.048587352,
    #   ln(1+e²) = 2.126928011; mean 0.829592350.
    # R^π_β = R − λ/2 = (5/2, 1, 3).  PG, b = 1: 3/2·1 + 0·0 + 2·(−2) = −5/2.
    # RLOO: (5/2 − 2)·1 + (1 − 11/4)·0 + (3 − 7/4)·(−2) = −2.  NLL: −(1 + 0 − 2) = 1.
    x, r = jnp.array([1.0, 0.0, -2.0]), jnp.array([3.0, 1.0, 2.0])
    got = {
        "copg": losses.copg_objective(x, r, beta=0.5),
        "ipo": losses.ipo_loss(x, r, beta=0.5),
        "dpo": losses.dpo_loss(x, r, beta=0.5),
        "bradley_terry": losses.bradley_terry_loss(x, r),
        "pg": losses.pg_objective(x, r, beta=0.5, baseline=1.0),
        "rloo": losses.rloo_objective(x, r, beta=0.5),
        "nll": losses.nll_loss(x),
    }
    expected = {
        "copg": -0.25,
        "ipo": 13 / 12,
        "dpo": 0.662917317,
        "bradley_terry": 0.829592350,
        "pg": -2.5,
        "rloo": -2.0,
        "nll": 1.0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)


def trl_inputs():
    """Summed log-probabilities and numbers of tokens of (chosen, rejected), as TRL has them."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(5, 40, size=(8, 2))
    return -3.0 * lengths + rng.normal(size=(8, 2)), -3.0 * lengths, lengths


def ours(loss, policy, reference):
    chosen_first = jnp.tile(jnp.array([1.0, 0.0]), (len(policy), 1))
    return loss(jnp.asarray(policy - reference), chosen_first, beta=BETA)


def test_dpo_equals_trl_sigmoid_loss(float64):
    policy, reference, _ = trl_inputs()
    logits = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
    trl = -np.log(1 / (1 + np.exp(-BETA * logits)))
    np.testing.assert_allclose(ours(losses.dpo_loss, policy, reference), trl, rtol=1e-12)


def test_ipo_is_beta_squared_times_trl_ipo_on_sums_and_no_multiple_of_it_on_averages(float64):
    policy, reference, lengths = trl_inputs()

    def trl(policy, reference):
        logits = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
        return (logits - 1 / (2 * BETA)) ** 2

    mine = ours(losses.ipo_loss, policy, reference)
    np.testing.assert_allclose(mine, BETA**2 * trl(policy, reference), rtol=1e-12)
    ratio = mine / trl(policy / lengths, reference / lengths)
    assert np.ptp(ratio) > 0.1 * np.abs(ratio).max()


# --- 2. invariances and the maximum ---


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_order_of_completions_and_shifts_within_a_prompt_change_nothing(name, float64):
    k = 3
    x, r = map(jnp.asarray, random_groups(k))
    value, gradient = LOSSES[name](x, r), grad(LOSSES[name], x, r)
    swap = np.roll(np.arange(k), 1)
    shift = jnp.arange(6.0)[:, None] - 2.5  # another constant for every prompt
    same = {
        "swapped": (
            LOSSES[name](x[:, swap], r[:, swap]),
            grad(LOSSES[name], x[:, swap], r[:, swap]),
        ),
        "R + b(x)": (LOSSES[name](x, r + shift), grad(LOSSES[name], x, r + shift)),
        "λ + c(x)": (LOSSES[name](x + shift, r), grad(LOSSES[name], x + shift, r)),
    }
    for what, (other_value, other_gradient) in same.items():
        expected = gradient[:, swap] if what == "swapped" else gradient
        np.testing.assert_allclose(other_value, value, rtol=1e-10, atol=1e-11, err_msg=what)
        np.testing.assert_allclose(other_gradient, expected, rtol=1e-10, atol=1e-11, err_msg=what)


@pytest.mark.parametrize("name", ["dpo", "ipo", "bradley_terry"])
def test_preference_losses_see_only_the_order_of_rewards(name, float64):
    x, r = map(jnp.asarray, random_groups(4))
    np.testing.assert_array_equal(LOSSES[name](x, r), LOSSES[name](x, 100 * jnp.exp(r)))
    assert not np.allclose(LOSSES["copg"](x, r), LOSSES["copg"](x, 100 * jnp.exp(r)))


@pytest.mark.parametrize("name", ["copg_objective", "rloo_objective"])
def test_scaling_rewards_and_beta_together_scales_the_objective(name, float64):
    x, r = map(jnp.asarray, random_groups(3))
    fn = getattr(losses, name)
    scaled = fn(x, 7.0 * r, beta=7.0 * BETA)
    np.testing.assert_allclose(scaled, 7.0 * fn(x, r, beta=BETA), rtol=1e-11)
    slope = grad(lambda x, r: fn(x, 7.0 * r, beta=7.0 * BETA), x, r)
    np.testing.assert_allclose(
        slope, 7.0 * grad(lambda x, r: fn(x, r, beta=BETA), x, r), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("k", [2, 5])
def test_copg_is_largest_where_every_gap_is_the_reward_gap_over_beta(k, float64):
    x, r = map(jnp.asarray, random_groups(k))
    optimum = r / BETA + 1.3
    np.testing.assert_allclose(grad(LOSSES["copg"], optimum, r), 0.0, atol=1e-12)
    residual = (r[:, :, None] - r[:, None, :]) - BETA * (optimum[:, :, None] - optimum[:, None, :])
    np.testing.assert_allclose(residual, 0.0, atol=1e-12)
    # The value there is Σ_{i<j} ΔR²/(2β)/(k−1); the deficit elsewhere is exactly quadratic.
    best = LOSSES["copg"](optimum, r)
    pairs = ((r[:, :, None] - r[:, None, :]) ** 2).sum((1, 2)) / 2
    np.testing.assert_allclose(best, pairs / (2 * BETA) / (k - 1), rtol=1e-10)
    deficit = best - LOSSES["copg"](optimum + x, r)
    np.testing.assert_allclose(
        deficit, -LOSSES["copg"](x, jnp.zeros_like(r)), rtol=1e-8, atol=1e-10
    )
    assert np.all(deficit > 0)


# --- 3. array functions ---


@pytest.mark.parametrize("name", LOSSES)
def test_jit_vmap_and_leading_axes_change_nothing(name):
    x, r = (jnp.asarray(a, jnp.float32) for a in random_groups(3))
    fn = EAGER[name]
    value = LOSSES[name](x, r)
    assert value.shape == (6,)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(fn(x, r), value, **tolerance)
    np.testing.assert_allclose(jax.jit(jax.vmap(fn))(x, r), value, **tolerance)
    stacked = jax.jit(fn)(x.reshape(2, 3, 3), r.reshape(2, 3, 3))
    np.testing.assert_allclose(stacked, value.reshape(2, 3), **tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_in_gives_float32_throughout(name):
    x = jnp.ones((2, 3))
    jaxpr = str(jax.make_jaxpr(jax.value_and_grad(lambda x, r: LOSSES[name](x, r).sum()))(x, x))
    assert "bf16" not in jaxpr and "f16[" not in jaxpr and "f64" not in jaxpr
    assert LOSSES[name](x, x).dtype == jnp.float32


def test_beta_and_baseline_may_be_traced():
    x, r = (jnp.asarray(a, jnp.float32) for a in random_groups(2))
    traced = jax.jit(lambda beta: losses.copg_objective(x, r, beta=beta))(jnp.float32(BETA))
    np.testing.assert_allclose(traced, LOSSES["copg"](x, r), rtol=1e-5)
    per_group = jax.jit(lambda b: losses.pg_objective(x, r, beta=BETA, baseline=b))(
        jnp.full(6, 0.3)
    )
    np.testing.assert_allclose(per_group, LOSSES["pg"](x, r), rtol=1e-5)


def test_baselines_belong_to_groups(float64):
    x, r = map(jnp.asarray, random_groups(2))
    baseline = jnp.arange(6.0)
    together = losses.pg_objective(x, r, beta=BETA, baseline=baseline)
    each = [losses.pg_objective(x[i], r[i], beta=BETA, baseline=float(i)) for i in range(6)]
    np.testing.assert_allclose(together, each, rtol=1e-12)


@pytest.mark.parametrize("name", ["dpo", "bradley_terry"])
def test_logistic_losses_stay_finite_at_extreme_gaps(name):
    x, r = jnp.array([[1e4, -1e4], [-1e4, 1e4]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    scale = BETA if name == "dpo" else 1.0
    np.testing.assert_allclose(LOSSES[name](x, r), [0.0, 2e4 * scale], rtol=1e-6)
    slope = [[0.0, 0.0], [-scale, scale]]
    np.testing.assert_allclose(grad(LOSSES[name], x, r), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "nll"])
@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (3,), (2, 1)])
def test_rewards_of_another_shape_are_refused(name, shape):
    with pytest.raises(AssertionError, match="shape"):
        jax.eval_shape(EAGER[name], jnp.zeros((2, 3)), jnp.zeros(shape))


def test_baselines_of_another_shape_are_refused():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="broadcast"):
        losses.pg_objective(x, x, beta=BETA, baseline=jnp.zeros(3))

"""Absent completions: a masked group is the smaller group, whatever the absent ones hold."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax import losses, relatives

BETA = 0.4
K = 4
GARBAGE = [np.nan, np.inf, -np.inf, 1e30]
MASKS = np.array(list(itertools.product([False, True], repeat=K)))

ORIGIN = np.array([0, 1, 0, 1])


def cross(x, r, m):
    """CoPG over pairs of different origins; of four completions two are from each."""
    origin = jnp.broadcast_to(ORIGIN[: x.shape[-1]], x.shape)
    return losses.cross_copg_objective(x, r, beta=BETA, origin=origin, mask=m)


LOSSES = {
    "copg": lambda x, r, m: losses.copg_objective(x, r, beta=BETA, mask=m),
    "cross_copg": cross,
    "dpo": lambda x, r, m: losses.dpo_loss(x, r, beta=BETA, mask=m),
    "ipo": lambda x, r, m: losses.ipo_loss(x, r, beta=BETA, mask=m),
    "pg": lambda x, r, m: losses.pg_objective(x, r, beta=BETA, baseline=0.3, mask=m),
    "rloo": lambda x, r, m: losses.rloo_objective(x, r, beta=BETA, mask=m),
    "bradley_terry": lambda x, r, m: losses.bradley_terry_loss(x, r, mask=m),
    "nll": lambda x, r, m: losses.nll_loss(x, mask=m),
    "regression": lambda x, r, m: relatives.regression_loss(x, r, beta=BETA, baseline=0.3, mask=m),
    "opmd": lambda x, r, m: relatives.opmd_loss(x, r, beta=BETA, mask=m),
    "oapl": lambda x, r, m: relatives.oapl_loss(x, r, beta=BETA, mask=m),
    "asymre": lambda x, r, m: relatives.asymre_objective(x, r, beta=BETA, delta_v=-0.1, mask=m),
    "topr": lambda x, r, m: relatives.topr_objective(x, r, r, mask=m),
    "topr_loss": lambda x, r, m: relatives.topr_loss(
        x, r, beta=BETA, mu_log_ratio=r, baseline=0.3, mask=m
    ),
}
ALONE = {"pg", "nll", "regression", "opmd", "oapl", "asymre", "topr", "topr_loss"}
"""Those that a lone completion teaches something: what they compare with is not another one."""


def groups() -> tuple[np.ndarray, np.ndarray]:
    """One group for every mask of K completions."""
    rng = np.random.default_rng(0)
    shape = (len(MASKS), K)
    return rng.normal(size=shape).astype(np.float32), rng.normal(size=shape).astype(np.float32)


@functools.cache
def value_and_grad(name: str, *, jit: bool = True):
    """(log_ratio, reward, mask) → value of each group, gradient of their sum."""

    def total(x, r, m):
        value = LOSSES[name](x, r, m)
        return value.sum(), value

    def run(x, r, m):
        slope, value = jax.grad(total, has_aux=True)(x, r, m)
        return value, slope

    return jax.jit(run) if jit else run


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cross_copg"])
def test_a_masked_group_equals_the_smaller_group(name):
    x, r = groups()
    run = value_and_grad(name)
    value, slope = run(x, r, MASKS)
    np.testing.assert_array_equal(np.asarray(slope)[~MASKS], 0.0)
    for count in (3,):  # of four
        rows = MASKS.sum(-1) == count
        small = [a[rows][MASKS[rows]].reshape(-1, count) for a in (x, r)]
        small_value, small_slope = run(*small, None)
        np.testing.assert_allclose(value[rows], small_value, rtol=1e-5, atol=1e-6)
        small_slope = np.asarray(small_slope).ravel()
        np.testing.assert_allclose(
            np.asarray(slope)[rows][MASKS[rows]], small_slope, rtol=1e-5, atol=1e-6
        )


def test_a_masked_group_equals_the_smaller_group_with_its_own_origins():
    x, r = groups()
    value, slope = value_and_grad("cross_copg")(x, r, MASKS)
    for row in np.flatnonzero(MASKS.sum(-1) >= 2):
        of = MASKS[row]
        numbers = {"beta": BETA, "origin": jnp.asarray(ORIGIN[of])}
        small = functools.partial(losses.cross_copg_objective, **numbers)
        kept = jnp.asarray(x[row, of]), jnp.asarray(r[row, of])
        small_value, small_slope = jax.value_and_grad(small)(*kept)
        np.testing.assert_allclose(value[row], small_value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(slope[row, of], small_slope, rtol=1e-5, atol=1e-6)
    assert (np.asarray(value) != 0).sum() == 9  # masks with both origins


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", LOSSES)
def test_numbers_of_absent_completions_change_neither_value_nor_gradient(name, jit):
    """Eagerly too: under jit XLA turns `value * mask` into a selection, which hides 0·NaN."""
    x, r = map(jnp.asarray, groups())
    run = value_and_grad(name, jit=jit)
    value, slope = run(x, r, jnp.asarray(MASKS))
    for garbage in GARBAGE:
        spoilt = [jnp.where(MASKS, a, garbage) for a in (x, r)]
        spoilt_value, spoilt_slope = run(*spoilt, jnp.asarray(MASKS))
        np.testing.assert_array_equal(spoilt_value, value, err_msg=str(garbage))
        np.testing.assert_array_equal(spoilt_slope, slope, err_msg=str(garbage))


@pytest.mark.parametrize("name", LOSSES)
def test_groups_without_a_pair_give_exactly_nothing(name):
    x, r = groups()
    alone_counts = name in ALONE
    rows = MASKS.sum(-1) <= (0 if alone_counts else 1)
    spoilt = [np.where(MASKS, a, np.float32(np.nan)) for a in (x, r)]
    value, slope = value_and_grad(name)(*spoilt, MASKS)
    np.testing.assert_array_equal(value[rows], 0.0)
    np.testing.assert_array_equal(slope[rows], 0.0)
    assert np.isfinite(value).all() and np.isfinite(slope).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_lone_completion_without_mask_is_a_group_without_a_pair(name):
    x, r = jnp.ones((3, 1)), jnp.full((3, 1), 0.5)
    value, slope = value_and_grad(name)(x, r, None)
    if name in ALONE:
        assert np.all(value != 0) and np.all(slope != 0)
    else:
        np.testing.assert_array_equal(value, 0.0)
        np.testing.assert_array_equal(slope, 0.0)


def test_a_nan_baseline_of_an_absent_group_is_harmless():
    x, r = groups()
    baseline = np.where(MASKS.any(-1), 0.3, np.nan).astype(np.float32)
    got = losses.pg_objective(
        jnp.asarray(x), jnp.asarray(r), beta=BETA, baseline=baseline, mask=MASKS
    )
    np.testing.assert_allclose(got, LOSSES["pg"](x, r, MASKS), rtol=1e-6)


def test_multiplying_by_the_mask_instead_of_selecting_lets_nan_through():
    """Why the losses select with `where`, before the arithmetic: 0·NaN is NaN."""
    x, r, mask = jnp.array([1.0, 2.0, jnp.nan]), jnp.zeros(3), jnp.array([True, True, False])

    def multiplied(x):
        weight = mask.astype(x.dtype)
        gap = x - (x * weight).sum() / weight.sum()
        return (gap**2 * weight).sum()

    def selected_too_late(x):
        return jnp.where(mask, jnp.where(mask, x, 0.0) ** 2 * jnp.exp(x), 0.0).sum()

    assert np.isnan(multiplied(x))
    assert np.isfinite(selected_too_late(x)) and np.isnan(jax.grad(selected_too_late)(x)).any()
    assert np.isfinite(jax.grad(lambda x: LOSSES["copg"](x, r, mask))(x)).all()


@pytest.mark.parametrize("name", LOSSES)
def test_masks_may_be_numbers_and_must_have_the_shape_of_the_group(name):
    x, r = groups()
    expected = value_and_grad(name)(x, r, MASKS)[0]
    numbers = jnp.asarray(MASKS, jnp.int32)
    np.testing.assert_allclose(value_and_grad(name)(x, r, numbers)[0], expected, rtol=1e-6)
    for shape in [(K,), (len(MASKS), 1), (len(MASKS),)]:
        with pytest.raises(AssertionError, match="shape"):
            jax.eval_shape(LOSSES[name], x, r, jnp.ones(shape, bool))

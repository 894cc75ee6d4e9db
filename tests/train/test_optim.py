"""The optimiser against an independent Adam in NumPy, and its learning rate against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from copg_jax.config.sections import OptimConfig
from copg_jax.errors import InputError
from copg_jax.train.optim import learning_rate, make_optimizer, warmup_steps


def rates(config: OptimConfig, num_steps: int) -> np.ndarray:
    """Learning rate of every step."""
    return np.array([learning_rate(config, num_steps, step) for step in range(num_steps)])


def of_optax(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """The same, joined from the schedules of optax."""
    warmup, peak = round(config.warmup_fraction * num_steps), config.learning_rate
    if config.decay == "cosine":
        after = optax.cosine_decay_schedule(peak, max(num_steps - warmup, 1))
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


@pytest.mark.parametrize("decay", ["constant", "cosine"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.33, 1.0])
@pytest.mark.parametrize("num_steps", [1, 3, 10, 97])
def test_the_learning_rate_is_that_of_optax_to_float32(decay, fraction, num_steps):
    config = OptimConfig(3e-4, fraction, decay)
    schedule = jax.jit(jax.vmap(of_optax(config, num_steps)))
    wanted = np.asarray(schedule(jnp.arange(num_steps)))
    np.testing.assert_allclose(rates(config, num_steps), wanted, rtol=2e-6, atol=3e-11)
    assert isinstance(learning_rate(config, num_steps, 0), float)


def test_the_first_step_moves_and_the_warmup_ends_at_the_peak():
    found = rates(OptimConfig(learning_rate=2.0, warmup_fraction=0.1), 100)
    np.testing.assert_allclose(found[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(found[10:], 2.0, rtol=1e-6)


def test_cosine_falls_from_the_peak_to_zero_at_the_last_step():
    config = OptimConfig(learning_rate=2.0, warmup_fraction=0.2, decay="cosine")
    assert learning_rate(config, 50, 9) == pytest.approx(2.0)
    assert learning_rate(config, 50, 30) == pytest.approx(1.0)  # half way through the decay
    assert learning_rate(config, 50, 50) == pytest.approx(0.0, abs=1e-6)
    assert learning_rate(config, 50, 49) > 0


@pytest.mark.parametrize("num_steps", [10**18, 10**25])
@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_the_rate_of_a_run_of_any_length_is_exact(decay, num_steps):
    config = OptimConfig(learning_rate=2.0, warmup_fraction=0.1, decay=decay)
    assert warmup_steps(config, num_steps) == pytest.approx(num_steps / 10)
    assert learning_rate(config, num_steps, 0) == pytest.approx(20.0 / num_steps)
    assert learning_rate(config, num_steps, num_steps // 5) == pytest.approx(
        2.0 if decay == "constant" else 1 + np.cos(np.pi / 9)
    )


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_without_warmup_the_first_step_has_the_peak(decay):
    config = OptimConfig(learning_rate=3.0, warmup_fraction=0.0, decay=decay)
    assert learning_rate(config, 5, 0) == pytest.approx(3.0)


def test_a_warmup_of_one_step_and_a_run_that_is_all_warmup_are_finite():
    for fraction, num_steps in ((0.1, 10), (1.0, 4), (1.0, 1)):
        found = rates(OptimConfig(1.0, fraction, "cosine"), num_steps)
        assert ((found > 0) & (found <= 1)).all(), found


def run(config: OptimConfig, gradients: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Parameters after each update."""
    optimizer = make_optimizer(config)
    params = jnp.asarray(start)
    state, trace = optimizer.init(params), []
    for at, gradient in enumerate(gradients):
        rate = learning_rate(config, len(gradients), at)
        updates, state = optimizer.update(jnp.asarray(gradient), state, params, learning_rate=rate)
        params = optax.apply_updates(params, updates)
        trace.append(np.asarray(params))
    return np.stack(trace)


@pytest.mark.parametrize("extra", [{}, {"weight_decay": 0.3}, {"clip_norm": 0.5}], ids=str)
def test_updates_are_those_of_optax_s_adam_with_its_schedule(rng, extra):
    config = OptimConfig(0.1, 0.3, "cosine", **extra)
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    theirs = optax.chain(*parts, optax.adamw(of_optax(config, 8), weight_decay=config.weight_decay))
    gradients = rng.normal(size=(8, 5)).astype(np.float32)
    start = rng.normal(size=5).astype(np.float32)
    params = jnp.asarray(start)
    state, wanted = theirs.init(params), []
    for gradient in gradients:
        updates, state = theirs.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        wanted.append(np.asarray(params))
    np.testing.assert_allclose(run(config, gradients, start), wanted, rtol=1e-6, atol=1e-6)


def test_an_update_without_a_learning_rate_is_an_error():
    optimizer, params = make_optimizer(OptimConfig()), jnp.ones(2)
    with pytest.raises(TypeError, match="wants a learning rate"):
        optimizer.update(params, optimizer.init(params), params)


def numpy_adam(config: OptimConfig, gradients: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Kingma & Ba, Algorithm 1, with decoupled weight decay and a clipped global norm."""
    x, m, v, trace = start.astype(np.float64), 0.0, 0.0, []
    for t, gradient in enumerate(gradients.astype(np.float64), start=1):
        norm = np.sqrt((gradient**2).sum())
        if config.clip_norm is not None and norm > config.clip_norm:
            gradient = gradient * config.clip_norm / norm
        m = config.b1 * m + (1 - config.b1) * gradient
        v = config.b2 * v + (1 - config.b2) * gradient**2
        step = (m / (1 - config.b1**t)) / (np.sqrt(v / (1 - config.b2**t)) + config.eps)
        x = x - config.learning_rate * (step + config.weight_decay * x)
        trace.append(x)
    return np.stack(trace)


@pytest.mark.parametrize(
    "extra",
    [{}, {"weight_decay": 0.3}, {"clip_norm": 0.5}, {"b1": 0.5, "b2": 0.9, "eps": 1e-3}],
    ids=str,
)
def test_three_steps_are_those_of_adam_in_numpy(rng, extra):
    config = OptimConfig(learning_rate=0.1, warmup_fraction=0.0, **extra)
    gradients = rng.normal(size=(3, 5)).astype(np.float32)
    start = rng.normal(size=5).astype(np.float32)
    got = run(config, gradients, start)
    np.testing.assert_allclose(got, numpy_adam(config, gradients, start), rtol=1e-4, atol=1e-5)


def test_clipping_changes_a_large_gradient_and_no_small_one(rng):
    # Adam forgets the scale of a gradient; the second step shows it.
    gradients = np.array([[3.0, 4.0], [0.3, 0.4]], np.float32)
    start = np.zeros(2, np.float32)
    plain = run(OptimConfig(0.1, 0.0), gradients, start)
    clipped = run(OptimConfig(0.1, 0.0, clip_norm=1.0), gradients, start)
    assert np.abs(plain[1] - clipped[1]).max() > 1e-2
    loose = run(OptimConfig(0.1, 0.0, clip_norm=100.0), gradients, start)
    np.testing.assert_array_equal(plain, loose)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup_fraction", 1.5),
        ("decay", "linear"),
        ("b1", 1.0),
        ("b2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        ("clip_norm", 0.0),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(InputError, match=field):
        OptimConfig(**{field: value})

"""The optimiser against an independent Adam in NumPy, and its schedule."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from copg_jax.errors import InputError
from copg_jax.train.optim import OptimConfig, make_optimizer, make_schedule


def test_the_first_step_moves_and_the_warmup_ends_at_the_peak():
    schedule = make_schedule(OptimConfig(learning_rate=2.0, warmup_fraction=0.1), 100)
    rates = np.array([schedule(step) for step in range(100)])
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[10:], 2.0, rtol=1e-6)


def test_cosine_falls_from_the_peak_to_zero_at_the_last_step():
    config = OptimConfig(learning_rate=2.0, warmup_fraction=0.2, decay="cosine")
    schedule = make_schedule(config, 50)
    assert float(schedule(9)) == pytest.approx(2.0)
    assert float(schedule(30)) == pytest.approx(1.0)  # half way through the decay
    assert float(schedule(50)) == pytest.approx(0.0, abs=1e-6)
    assert float(schedule(49)) > 0


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_without_warmup_the_first_step_has_the_peak(decay):
    schedule = make_schedule(OptimConfig(learning_rate=3.0, warmup_fraction=0.0, decay=decay), 5)
    assert float(schedule(0)) == pytest.approx(3.0)


def test_a_warmup_of_one_step_and_a_run_that_is_all_warmup_are_finite():
    for fraction, num_steps in ((0.1, 10), (1.0, 4), (1.0, 1)):
        schedule = make_schedule(OptimConfig(1.0, fraction, "cosine"), num_steps)
        rates = [float(schedule(step)) for step in range(num_steps)]
        assert all(0 < rate <= 1 for rate in rates), rates


def run(config: OptimConfig, gradients: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Parameters after each update."""
    optimizer = make_optimizer(config, len(gradients))
    params = jnp.asarray(start)
    state, trace = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        trace.append(np.asarray(params))
    return np.stack(trace)


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

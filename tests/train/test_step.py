"""The train step: the same on any mesh, arguments that compile nothing, float32 masters, batches
that are not finite.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from copg_jax import distributed, losses, objective, sharding
from copg_jax.config.sections import OptimConfig
from copg_jax.models.decoder import Decoder
from copg_jax.models.forward import make_score, make_seq_logp, predictive_hidden
from copg_jax.models.layout import GroupPacking
from copg_jax.models.lora import lora_specs
from copg_jax.models.params import abstract, axes_of, param_specs
from copg_jax.objective import LossFn, LossOutput, ModelFn
from copg_jax.sharding import ONE_DEVICE, Partitioner
from copg_jax.train import state as train_state
from copg_jax.train.optim import make_optimizer
from copg_jax.train.step import make_loss_step, make_train_step
from tests.toys import (
    EVERYTHING,
    LLAMA,
    Toy,
    assert_trees_equal,
    group_batch,
    in_bins,
    leaves,
    mesh,
    toy_loss,
    toy_params,
)

BATCH = group_batch(
    np.random.default_rng(0).normal(size=(8, 3)),
    length=[[1, 2, 5], [4, 4, 0], [0, 0, 0], [3, 1, 2], [5, 5, 5], [2, 0, 0], [1, 1, 1], [2, 3, 4]],
    ref_logp=np.random.default_rng(1).normal(size=(8, 3)) - 10,
)


def make_language_loss(partitioner: Partitioner) -> LossFn:
    """Sum of three losses on one forward pass, which saves compiling three."""
    seq_logp = make_seq_logp(LLAMA, partitioner)

    def loss_fn(params: Any, batch: Any, beta: Any) -> LossOutput:
        logp = seq_logp(params, batch)
        known: ModelFn = lambda params, batch: logp
        outputs = {
            "nll": objective.make_nll_loss(known)(params, batch),
            "copg": objective.make_policy_loss(known, losses.copg_loss)(params, batch, beta),
            "dpo": objective.make_policy_loss(known, losses.dpo_loss)(params, batch, beta),
        }
        metrics = {
            f"{name}/{key}": value
            for name, output in outputs.items()
            for key, value in output.metrics.items()
        }
        total, weight, per_group = (
            sum(getattr(output, field) for output in outputs.values())
            for field in ("total", "weight", "per_group")
        )
        return LossOutput(total, weight, per_group, metrics)

    return loss_fn


def make_score_loss(partitioner: Partitioner) -> LossFn:
    """Bradley–Terry on the tiny reward model."""
    return objective.make_bradley_terry_loss(make_score(EVERYTHING, partitioner))


HEADS: dict[str, tuple[Callable[[Partitioner], LossFn], dict[str, float]]] = {
    "lm": (make_language_loss, {"beta": 0.1}),
    "score": (make_score_loss, {}),
    "lora": (make_score_loss, {}),
}
ARCHITECTURES = {"lm": LLAMA, "score": EVERYTHING, "lora": EVERYTHING}


def one_step(head: str, sizes: tuple[int, ...], num_microbatches: int) -> Any:
    """One step of plain gradient descent, so that the change of parameters is the gradient.

    "lora" trains adapters and a score head beside frozen weights.
    """
    on, optimizer = mesh(*sizes), optax.sgd(1.0)
    make_loss, coefficients = HEADS[head]
    arch = ARCHITECTURES[head]
    specs = param_specs(arch, head="lm" if head == "lm" else "score")
    trained, rest = specs, {}
    if head == "lora":
        trained, rest = {"lora": lora_specs(arch, 3), "score": specs.pop("score")}, specs
    axes, shapes = axes_of(trained), abstract(trained)
    layout = train_state.state_shardings(on, optimizer, shapes, axes)
    rng = np.random.default_rng(7)
    drawn = lambda s: 0.3 * rng.normal(size=s.shape).astype(np.float32)
    host = jax.tree.map(drawn, shapes)
    params = jax.device_put(host, layout.params)
    frozen = jax.tree.map(drawn, abstract(rest)) | {"lora_scale": np.float32(0.7)}
    frozen = jax.device_put(
        frozen, sharding.shardings(on, axes_of(rest) | {"lora_scale": ()}, frozen)
    )
    state = train_state.create_state(optimizer, params, layout)
    step_fn = make_train_step(
        make_loss(Partitioner(on)),
        optimizer,
        mesh=on,
        state_shardings=layout,
        num_microbatches=num_microbatches,
    )
    batch = in_bins(BATCH, sharding.num_batch_shards(on) * num_microbatches)
    placed = distributed.place(batch, sharding.batch_sharding(on))
    new, metrics = step_fn(state, placed, frozen=frozen if rest else None, **coefficients)
    gradient = jax.tree.map(lambda old, after: old - np.asarray(after), host, new.params)
    return jax.device_get(metrics), gradient


@pytest.fixture(scope="session")
def on_one_device() -> dict[str, Any]:
    """Metrics and gradient on one device in one piece, by head."""
    return {head: one_step(head, (1, 1, 1), 1) for head in HEADS}


@pytest.mark.parametrize(
    ("head", "sizes", "num_microbatches"),
    [
        ("lm", (1, 8, 1), 1),
        ("lm", (1, 4, 2), 2),
        ("lm", (2, 2, 2), 2),
        ("lm", (1, 1, 1), 4),
        ("score", (1, 4, 2), 2),
        ("lora", (2, 2, 2), 2),
    ],
    ids=str,
)
def test_any_mesh_and_any_microbatches_give_the_numbers_of_one_device_in_one_piece(
    on_one_device, head, sizes, num_microbatches
):
    metrics, gradient = one_step(head, sizes, num_microbatches)
    wanted_metrics, wanted_gradient = on_one_device[head]
    assert metrics.keys() == wanted_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, wanted_metrics[name], 1e-5, 1e-5, err_msg=name)
    got, wanted = leaves(gradient), leaves(wanted_gradient)
    assert max(np.abs(leaf).max() for leaf in wanted) > 1e-2
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-5)


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_microbatches_leave_the_adam_update_and_the_per_group_losses_alone(num_microbatches):
    batch = group_batch(np.arange(16.0).reshape(8, 2), length=[[1, 1]] * 6 + [[2, 0], [0, 0]])
    whole, cut = Toy(), Toy(num_microbatches=num_microbatches)
    state, metrics = whole.step(whole.state, whole.place(batch))
    cut_state, cut_metrics = cut.step(cut.state, cut.place(batch))
    np.testing.assert_allclose(state.params["w"], cut_state.params["w"], rtol=1e-6)
    np.testing.assert_allclose(metrics["per_group"], cut_metrics["per_group"], rtol=1e-6)


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_without_a_mesh_the_step_runs_on_one_device_with_the_numbers_of_a_mesh(num_microbatches):
    batch = group_batch(np.arange(16.0).reshape(8, 2))
    toy, optimizer = Toy(), optax.adam(0.1)
    wanted, wanted_metrics = toy.step(toy.state, toy.place(batch))
    step_fn = make_train_step(toy_loss, optimizer, num_microbatches=num_microbatches)
    state, metrics = step_fn(train_state.create_state(optimizer, toy_params()), batch)
    assert {device for leaf in jax.tree.leaves(state) for device in leaf.devices()} == {
        jax.devices()[0]
    }
    for got, leaf in zip(leaves(state), leaves(wanted), strict=True):
        np.testing.assert_allclose(got, leaf, rtol=1e-6)
    np.testing.assert_allclose(metrics["per_group"], wanted_metrics["per_group"], rtol=1e-6)


def scaled_loss(params: Any, batch: Any, scale: Any) -> LossOutput:
    """The toy loss times a number."""
    output = toy_loss(params, batch)
    return output._replace(total=scale * output.total, per_group=scale * output.per_group)


def test_numbers_of_the_loss_and_the_learning_rate_are_arguments_of_one_compilation():
    toy = Toy(optimizer=make_optimizer(OptimConfig(b1=0.0)), loss_fn=scaled_loss)
    batch, before = toy.place(group_batch(np.zeros((8, 2)))), leaves(toy.state.params)[0]
    state, metrics, found = toy.state, {}, []
    for scale, rate in ((1.0, 0.25), (3.0, 0.25), (3.0, 0.5)):
        state = train_state.create_state(
            toy.optimizer, jax.device_put(toy_params(), toy.layout.params), toy.layout
        )
        state, metrics = toy.step(state, batch, scale=scale, learning_rate=rate)
        moved = before - np.asarray(state.params["w"])
        found.append((float(metrics["per_group"][0]), float(moved[0])))
        assert float(metrics["optim/learning_rate"]) == rate
    # Adam's first step is the learning rate, whatever the scale of the gradient.
    np.testing.assert_allclose(found, [(2.0, 0.25), (6.0, 0.25), (6.0, 0.5)], rtol=1e-5)
    assert toy.step._cache_size() == 1


def test_a_number_that_the_loss_does_not_take_or_that_is_missing_is_an_error():
    toy = Toy(loss_fn=scaled_loss)
    batch = toy.place(group_batch(np.zeros((8, 2))))
    with pytest.raises(TypeError, match="scale"):
        toy.step(toy.state, batch)
    with pytest.raises(TypeError, match="beta"):
        toy.step(toy.state, batch, scale=1.0, beta=0.5)


def test_the_state_is_donated():
    toy = Toy()
    toy.step(toy.state, toy.place(group_batch(np.ones((8, 2)))))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(toy.state))


def test_a_state_without_shardings_copies_the_parameters_of_the_caller():
    optimizer, params = optax.adam(0.1), toy_params()
    before = leaves(params)[0]
    step_fn = make_train_step(toy_loss, optimizer)
    state = first = train_state.create_state(optimizer, params)
    for _ in range(2):
        state, _ = step_fn(state, group_batch(np.zeros((8, 2))))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    np.testing.assert_array_equal(params["w"], before)
    assert np.abs(np.asarray(state.params["w"]) - before).max() > 0.1


def test_masters_moments_and_metrics_are_float32_under_bfloat16_compute():
    arch = replace(LLAMA, dtype="bfloat16")
    optimizer, shapes = make_optimizer(OptimConfig()), abstract(param_specs(arch))
    step_fn = make_train_step(
        objective.make_policy_loss(make_seq_logp(arch), losses.copg_loss), optimizer
    )
    state, metrics = jax.eval_shape(
        lambda state: step_fn(state, BATCH, beta=0.1, learning_rate=0.1),
        train_state.abstract_state(optimizer, shapes),
    )
    # The model did compute in bfloat16: its hidden states show it.
    decoder = Decoder(arch, ONE_DEVICE)
    hidden = jax.eval_shape(
        lambda p: predictive_hidden(decoder, p, BATCH, GroupPacking.of(BATCH)), shapes
    )
    assert hidden.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves((state.params, state.opt_state, metrics)):
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_), leaf


def test_an_update_of_a_millionth_survives_in_float32_and_not_in_bfloat16():
    toy = Toy(optimizer=optax.adam(1e-6))
    before = leaves(toy.state.params)[0]
    state, _ = toy.step(toy.state, toy.place(group_batch(np.zeros((8, 2)))))
    np.testing.assert_allclose(before - np.asarray(state.params["w"]), 1e-6, rtol=0.1)
    rounded = jnp.asarray(before, jnp.bfloat16)
    assert (rounded - jnp.full_like(rounded, 1e-6) == rounded).all()


def test_a_batch_of_ties_changes_nothing_and_stays_finite():
    optimizer, params = optax.sgd(1.0), {"logp": jnp.array([[-1.0, -2.0], [-1.5, -1.0]])}
    loss_fn = objective.make_policy_loss(lambda params, batch: params["logp"], losses.dpo_loss)
    step_fn = make_train_step(loss_fn, optimizer)
    state = train_state.create_state(optimizer, params)
    state, metrics = step_fn(state, group_batch(np.ones((2, 2))), beta=0.5)
    np.testing.assert_array_equal(state.params["logp"], params["logp"])
    assert metrics["finite"] and not state.halted and metrics["optim/grad_norm"] == 0
    assert np.isnan(metrics["loss"])  # nothing was counted: an average of nothing


@pytest.mark.parametrize("bad", ["reward", "parameter"])
def test_a_step_that_is_not_finite_halts_the_state_and_later_steps_change_nothing(bad):
    toy = Toy()
    good = group_batch(np.ones((8, 2)))
    broken = good._replace(reward=np.where(np.arange(16).reshape(8, 2) == 5, np.inf, good.reward))
    state, metrics = toy.step(toy.state, toy.place(good))
    assert metrics["finite"]
    if bad == "parameter":
        state = state._replace(params={"w": state.params["w"].at[3].set(jnp.nan)})
        broken = good
    kept = leaves(state._replace(halted=jnp.bool_(True)))
    state, metrics = toy.step(state, toy.place(broken))
    assert not metrics["finite"] and state.halted
    bad_rows = np.flatnonzero(~np.isfinite(metrics["per_group"]))
    assert list(bad_rows) == ([2] if bad == "reward" else list(range(8)))
    state, _ = toy.step(state, toy.place(good))
    assert_trees_equal(state, kept)
    assert int(state.step) == 1


def test_the_loss_step_returns_sums_and_weights():
    on = mesh(1, 8, 1)
    toy = Toy(on)
    loss_step = make_loss_step(toy_loss, mesh=on)
    batch = group_batch(np.ones((8, 2)) * 3, length=[[1, 1]] * 4 + [[0, 0]] * 4)
    total, weight = loss_step(toy.state.params, toy.place(batch))["loss"]
    assert (float(total), float(weight)) == pytest.approx((8 * (1.0 - 3.0) ** 2, 8))

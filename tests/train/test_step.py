"""The train step: the same on any mesh, one trace, float32 masters, ties, non-finite batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from copg_jax import distributed, sharding
from copg_jax.models.forward import predictive_hidden
from copg_jax.models.params import abstract_params, logical_axes
from copg_jax.train import state as train_state
from copg_jax.train import step
from copg_jax.train.optim import OptimConfig, make_optimizer
from tests.toys import (
    LLAMA,
    Toy,
    assert_trees_equal,
    group_batch,
    in_blocks,
    leaves,
    mesh,
    toy_loss,
)

BATCH = group_batch(
    np.random.default_rng(0).normal(size=(8, 3)),
    length=[[1, 2, 5], [4, 4, 0], [0, 0, 0], [3, 1, 2], [5, 5, 5], [2, 0, 0], [1, 1, 1], [2, 3, 4]],
    ref_logp=np.random.default_rng(1).normal(size=(8, 3)) - 10,
)
LANGUAGE_LOSSES: dict[str, step.LossFn] = {
    "nll": step.make_nll_loss(LLAMA),
    "copg": step.make_policy_loss(LLAMA, "copg", beta=0.1),
    "dpo": step.make_policy_loss(LLAMA, "dpo", beta=0.1),
}


def all_language_losses(params: Any, batch: Any) -> tuple[jax.Array, step.LossOutput]:
    """Sum of three losses on one forward pass, which saves compiling three."""
    logp = policy.seq_logp(LLAMA, params, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "seq_logp", lambda *_, **__: logp)
        outputs = {name: loss(params, batch) for name, loss in LANGUAGE_LOSSES.items()}
    metrics = {
        f"{name}/{key}": value
        for name, (_, aux) in outputs.items()
        for key, value in aux.metrics.items()
    }
    total = sum(loss for loss, _ in outputs.values())
    weight = sum(aux.weight for _, aux in outputs.values())
    per_group = sum(aux.per_group for _, aux in outputs.values())
    return total, step.LossOutput(weight, per_group, metrics)


def one_step(head: str, loss_fn: step.LossFn, sizes: tuple[int, ...], num_microbatches: int) -> Any:
    """One step of plain gradient descent, so that the change of parameters is the gradient."""
    on, optimizer = mesh(*sizes), optax.sgd(1.0)
    axes, shapes = (
        logical_axes(LLAMA, head=head),
        abstract_params(LLAMA, head=head),
    )
    layout = train_state.state_shardings(on, optimizer, shapes, axes)
    rng = np.random.default_rng(7)
    host = jax.tree.map(lambda s: 0.3 * rng.normal(size=s.shape).astype(np.float32), shapes)
    params = jax.device_put(host, layout.params)
    state = train_state.TrainState(
        jax.device_put(np.int32(0), layout.step),
        params,
        optimizer.init(params),
        jax.device_put(np.bool_(False), layout.halted),
    )
    step_fn = step.make_train_step(
        loss_fn, optimizer, mesh=on, state_shardings=layout, num_microbatches=num_microbatches
    )
    batch = in_blocks(BATCH, sharding.num_batch_shards(on) * num_microbatches)
    new, metrics = step_fn(state, distributed.place(batch, sharding.batch_sharding(on)))
    gradient = jax.tree.map(lambda old, after: old - np.asarray(after), host, new.params)
    return jax.device_get(metrics), gradient


@pytest.fixture(scope="session")
def on_one_device() -> dict[str, Any]:
    """Metrics and gradient on one device in one piece, by head."""
    return {
        "lm": one_step("lm", all_language_losses, (1, 1, 1), 1),
        "score": one_step("score", step.make_bradley_terry_loss(LLAMA), (1, 1, 1), 1),
    }


@pytest.mark.parametrize(
    ("head", "sizes", "num_microbatches"),
    [
        ("lm", (1, 8, 1), 1),
        ("lm", (1, 4, 2), 2),
        ("lm", (2, 2, 2), 2),
        ("lm", (1, 1, 1), 4),
        ("score", (1, 4, 2), 2),
    ],
    ids=str,
)
def test_any_mesh_and_any_microbatches_give_the_numbers_of_one_device_in_one_piece(
    on_one_device, head, sizes, num_microbatches
):
    loss_fn = all_language_losses if head == "lm" else step.make_bradley_terry_loss(LLAMA)
    metrics, gradient = one_step(head, loss_fn, sizes, num_microbatches)
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


def test_a_second_shape_is_refused_and_a_second_step_function_is_not():
    toy = Toy()
    state, _ = toy.step(toy.state, toy.place(group_batch(np.ones((8, 2)))))
    state, _ = toy.step(state, toy.place(group_batch(np.zeros((8, 2)))))
    with pytest.raises(RuntimeError, match=r"train_step was traced again.*\(8, 3\)"):
        toy.step(state, toy.place(group_batch(np.ones((8, 3)))))
    other = Toy()
    other.step(other.state, other.place(group_batch(np.ones((8, 2)))))


def test_the_same_shape_is_refused_in_another_dtype():
    toy = Toy()
    state, _ = toy.step(toy.state, toy.place(group_batch(np.ones((8, 2)))))
    batch = group_batch(np.ones((8, 2)))
    with pytest.raises(RuntimeError, match="dtypes are fixed"):
        toy.step(state, toy.place(batch._replace(reward=batch.reward.astype(np.float16))))


def test_the_state_is_donated():
    toy = Toy()
    toy.step(toy.state, toy.place(group_batch(np.ones((8, 2)))))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(toy.state))


def test_masters_moments_and_metrics_are_float32_under_bfloat16_compute():
    config = LLAMA.__class__(**{**vars(LLAMA), "dtype": "bfloat16"})
    optimizer = make_optimizer(OptimConfig(), 10)
    shapes = abstract_params(config)
    layout = train_state.state_shardings(mesh(), optimizer, shapes, logical_axes(config))
    loss_fn = step.make_policy_loss(config, "copg", beta=0.1)
    step_fn = step.make_train_step(loss_fn, optimizer, mesh=mesh(), state_shardings=layout)
    state, metrics = jax.eval_shape(step_fn, train_state.abstract_state(optimizer, shapes), BATCH)
    # The model did compute in bfloat16: its hidden states show it.
    hidden = jax.eval_shape(lambda p: predictive_hidden(config, p, BATCH), shapes)
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


def look_up(config: Any, params: Any, batch: Any, *, chunk: int | None = None) -> jax.Array:
    """Stands in for the model: ln π of each completion is a parameter."""
    return params["logp"]


@pytest.fixture
def no_model(monkeypatch):
    """Policy losses whose ln π are the parameters themselves."""
    monkeypatch.setattr(step.policy, "seq_logp", look_up)


TIED = group_batch([[1.0, 1.0], [2.0, 0.5], [3.0, 3.0], [0.0, 1.0]])
LOGP = {"logp": jnp.array([[-1.0, -2.0], [-1.5, -1.0], [-3.0, -2.5], [-0.5, -2.0]])}


@pytest.mark.parametrize(("name", "counted"), [("dpo", 2), ("ipo", 2), ("copg", 4), ("rloo", 4)])
def test_groups_of_ties_leave_the_average_of_order_losses_only(no_model, name, counted):
    _, aux = jax.jit(step.make_policy_loss(LLAMA, name, beta=0.5))(LOGP, TIED)
    assert aux.weight == counted
    total, weight = aux.metrics["loss"]
    np.testing.assert_allclose(total, aux.per_group.sum(), rtol=1e-6)
    assert weight == counted
    # CoPG learns from a tie that both log-ratios should be equal; DPO and IPO learn nothing.
    assert bool(aux.per_group[0] == 0) == (name in ("dpo", "ipo"))


@pytest.mark.parametrize("name", ["copg", "dpo", "ipo", "rloo", "pg"])
def test_absent_groups_and_completions_change_neither_loss_nor_gradient_nor_metrics(no_model, name):
    loss = step.make_policy_loss(LLAMA, name, beta=0.5)
    loss_fn = jax.jit(jax.value_and_grad(loss, has_aux=True))
    filled = TIED._replace(
        completion_length=np.pad(np.maximum(TIED.completion_length, 1), ((0, 2), (0, 1))),
        reward=np.pad(TIED.reward, ((0, 2), (0, 1)), constant_values=np.nan),
        ref_logp=np.pad(TIED.ref_logp, ((0, 2), (0, 1)), constant_values=np.nan),
    )
    padded = {"logp": jnp.pad(LOGP["logp"], ((0, 2), (0, 1)), constant_values=jnp.nan)}
    (total, aux), grads = loss_fn(LOGP, TIED)
    (filled_total, filled_aux), filled_grads = loss_fn(padded, filled)
    np.testing.assert_allclose(filled_total, total, rtol=1e-6)
    np.testing.assert_allclose(filled_grads["logp"][:4, :2], grads["logp"], rtol=1e-6)
    assert not filled_grads["logp"][4:].any() and not filled_grads["logp"][:, 2].any()
    assert filled_aux.weight == aux.weight
    for key, (value, weight) in aux.metrics.items():
        np.testing.assert_allclose(filled_aux.metrics[key], (value, weight), rtol=1e-6, err_msg=key)


def test_policy_metrics_are_those_of_the_best_and_the_worst_completion():
    logp = jnp.array([[-3.0, -1.0, -9.0], [-2.0, -4.0, 0.0], [-1.0, -1.0, -1.0]])
    ratio = jnp.array([[0.5, -0.5, 9.0], [1.0, 2.0, 0.0], [0.0, 1.0, 7.0]])
    reward = jnp.array([[2.0, 0.0, 50.0], [1.0, 4.0, 2.0], [1.0, 1.0, 1.0]])
    mask = jnp.array([[True, True, False], [True, True, True], [True, True, False]])
    sums = step.policy_metrics(logp, ratio, reward, mask, beta=0.5)
    got = {name: float(total / weight) for name, (total, weight) in sums.items()}
    # Gaps of reward 2, 3, 0 and of log-ratio 1, 1, 0 (a tie: best and worst are the same slot).
    assert got == pytest.approx(
        {
            "rewards/chosen": 0.5 * (0.5 + 2.0 + 0.0) / 3,
            "rewards/rejected": 0.5 * (-0.5 + 1.0 + 0.0) / 3,
            "rewards/margins": 0.5 * (1.0 + 1.0) / 2,
            "rewards/accuracies": 1.0,
            "logps/chosen": (-3.0 - 4.0 - 1.0) / 3,
            "logps/rejected": (-1.0 - 2.0 - 1.0) / 3,
            "copg/residual": (1.5 + 2.5 + 0.0) / 3,
            "copg/reward_r2": 1 - (1.5**2 + 2.5**2) / (2.0**2 + 3.0**2),
            "data/ties": 1 / 3,
            "data/reward": (2.0 + 0.0 + 1.0 + 4.0 + 2.0 + 1.0 + 1.0) / 7,
        }
    )


def test_the_residual_vanishes_and_r2_is_one_at_the_optimum():
    reward = jnp.array([[2.0, 0.0], [1.0, 4.0]])
    mask = jnp.ones((2, 2), bool)
    sums = step.policy_metrics(reward, reward / 0.25, reward, mask, beta=0.25)
    assert float(sums["copg/residual"][0]) == pytest.approx(0)
    assert float(sums["copg/reward_r2"][0] / sums["copg/reward_r2"][1]) == pytest.approx(1)


def test_the_sft_loss_is_the_mean_over_completion_tokens(no_model):
    batch = group_batch(np.zeros((2, 1)), length=[[4], [1]])
    logp = {"logp": jnp.array([[-8.0], [-1.0]])}
    total, aux = step.make_nll_loss(LLAMA)(logp, batch)
    assert (float(total), float(aux.weight)) == (9.0, 5.0)
    longer = batch._replace(prompt_length=batch.prompt_length + 100)
    assert step.make_nll_loss(LLAMA)(logp, longer)[1].weight == 5.0


def test_a_batch_of_ties_changes_nothing_and_stays_finite(no_model):
    optimizer = optax.sgd(1.0)
    params = {"logp": jnp.array(LOGP["logp"])}
    axes = {"logp": ("batch_of_none", None)}
    layout = train_state.state_shardings(mesh(), optimizer, params, axes)
    before = leaves(params)[0]
    state = train_state.create_state(optimizer, params, layout)
    loss_fn = step.make_policy_loss(LLAMA, "dpo", beta=0.5)
    step_fn = step.make_train_step(loss_fn, optimizer, mesh=mesh(), state_shardings=layout)
    state, metrics = step_fn(state, TIED._replace(reward=np.ones((4, 2), np.float32)))
    np.testing.assert_array_equal(state.params["logp"], before)
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
    loss_step = step.make_loss_step(toy_loss, mesh=on, param_shardings=toy.layout.params)
    batch = group_batch(np.ones((8, 2)) * 3, length=[[1, 1]] * 4 + [[0, 0]] * 4)
    total, weight = loss_step(toy.state.params, toy.place(batch))["loss"]
    assert (float(total), float(weight)) == pytest.approx((8 * (1.0 - 3.0) ** 2, 8))

"""Low-rank adapters: what they compute, what is trained, and what that costs."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from copg_jax.errors import InputError
from copg_jax.models import lora
from copg_jax.models.forward import make_score, make_seq_logp
from copg_jax.models.params import Architecture, Params, cast_matrices, init_params, initial
from copg_jax.objective import LossOutput
from copg_jax.sampling import make_sampler, row_keys
from copg_jax.train.state import create_state, joined
from copg_jax.train.step import make_train_step
from tests import toys
from tests.toys import EVERYTHING, LLAMA, RELATIVES, group_batch

BATCH = group_batch(np.zeros((3, 2)), length=[[5, 3], [4, 0], [1, 5]])
RANK, SCALE = 3, 0.75
FAMILIES = {"everything": EVERYTHING, "llama": LLAMA, **RELATIVES}


def adapters(arch: Architecture, *, zero: bool = False) -> dict[str, Any]:
    """Random adapters of every linear layer; with B = 0 where `zero`."""
    drawn = initial(lora.lora_specs(arch, RANK), jax.random.key(1))
    rng = np.random.default_rng(2)
    noise = lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32)
    return {"lora": drawn if zero else jax.tree.map(noise, drawn), "lora_scale": np.float32(SCALE)}


def base_of(arch: Architecture, head: str = "lm") -> Params:
    """Weights that are large enough to matter."""
    grown = lambda leaf: leaf if leaf.ndim == 1 else 5 * leaf
    return jax.tree.map(grown, init_params(arch, jax.random.key(0), head=head))


def factors_of(params: Params, stack: str, name: str) -> tuple[np.ndarray, ...]:
    """A and B of all layers of a stack, as matrices, and how a weight becomes one."""
    a, b = (np.asarray(params["lora"][stack][name + factor]) for factor in (lora.A, lora.B))
    return a.reshape(len(a), -1, a.shape[-1]), b.reshape(*b.shape[:2], -1)


def merged(base: Params, adapter: Params, scale: float) -> Params:
    """W + s A B, written down once more."""
    stacks = {}
    for stack in ("layers", "last_layer"):
        stacks[stack] = dict(base[stack])
        for name in lora.TARGETS:
            a, b = factors_of(adapter, stack, name)
            weight = base[stack][name]
            stacks[stack][name] = weight + scale * (a @ b).reshape(weight.shape)
    return base | stacks


@pytest.mark.parametrize(
    "family",
    [name if name == "everything" else pytest.param(name, marks=pytest.mark.slow)
     for name in FAMILIES],
)  # fmt: skip
def test_adapters_and_their_gradients_are_those_of_the_merged_weights(family):
    arch = FAMILIES[family]
    base, adapter = base_of(arch), adapters(arch)
    seq_logp, weight = make_seq_logp(arch), np.array([[1.0, -2.0], [0.5, 0.0], [1.5, 1.0]])

    def total(params: Params) -> tuple[jax.Array, jax.Array]:
        logp = seq_logp(params, BATCH)
        return (weight * logp).sum(), logp

    # One compiled function for both: gradients of all weights that there are.
    grads, logp = jax.jit(jax.grad(total, has_aux=True))(base | adapter)
    full = jax.jit(jax.grad(total, has_aux=True))
    full_grads, full_logp = full(merged(base, adapter, SCALE))
    np.testing.assert_allclose(logp, full_logp, rtol=1e-4, atol=1e-4)
    _, unscaled = full(merged(base, adapter, 1.0))
    assert np.abs(unscaled - full_logp).max() > 1e-2  # the scale is seen
    for stack in ("layers", "last_layer"):
        for name in lora.TARGETS:
            a, b = factors_of(adapter, stack, name)
            dw = np.asarray(full_grads[stack][name]).reshape(len(a), a.shape[1], -1)
            da, db = factors_of(grads, stack, name)
            for got, wanted in ((da, SCALE * dw @ b.mT), (db, SCALE * a.mT @ dw)):
                np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("dtype", "head", "make"),
    [("bfloat16", "lm", make_seq_logp), ("float32", "score", make_score)],
)
def test_while_b_is_zero_the_model_is_its_base_bit_for_bit(dtype, head, make):
    arch = replace(LLAMA, dtype=dtype)
    base, function = cast_matrices(arch, base_of(arch, head)), jax.jit(make(arch))
    new = function(base | adapters(arch, zero=True), BATCH)
    np.testing.assert_array_equal(new, function(base, BATCH))


def test_greedy_tokens_of_adapters_are_those_of_the_merged_weights():
    base, adapter = base_of(LLAMA), adapters(LLAMA)
    sampler = make_sampler(
        LLAMA, end_ids=[LLAMA.vocab_size], max_new_tokens=4, temperature=0.0, mesh=toys.mesh()
    )
    prompts = BATCH.prompt_tokens, BATCH.prompt_length, None, row_keys(0, 0, 3)
    got, wanted, other = (
        sampler(params, *prompts) for params in (base | adapter, merged(base, adapter, SCALE), base)
    )
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    np.testing.assert_allclose(got.token_logp, wanted.token_logp, atol=1e-4)
    assert (other.tokens != got.tokens).any()


def linear_loss(params: Params, batch: Any) -> LossOutput:
    """Mean of (x W − y)² of one linear layer, with an adapter or without."""
    x = batch.reward[:, :1] * jnp.arange(1.0, 5.0)[None, :]
    adapter = lora.Factors(params["a"], params["b"], jnp.float32(1.0)) if "a" in params else None
    per_group = ((lora.adapted(x, params["w"], adapter) - batch.reward[:, 1:]) ** 2).sum(-1)
    weight = jnp.float32(len(per_group))
    return LossOutput(per_group.sum(), weight, per_group, {})


def test_with_full_rank_a_step_is_that_of_full_fine_tuning_in_a_linear_layer():
    # With A orthogonal and B = 0 a step of gradient descent moves W + A B by A Aᵀ dW = dW.
    batch = group_batch(np.random.default_rng(0).normal(size=(8, 4)))
    optimizer, w = optax.sgd(1e-3), jax.random.normal(jax.random.key(0), (4, 3))
    a = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (4, 4)))[0]
    step = make_train_step(linear_loss, optimizer)
    full, _ = step(create_state(optimizer, {"w": w}), batch)
    trained = {"a": a, "b": jnp.zeros((4, 3))}
    low, _ = step(create_state(optimizer, trained), batch, frozen={"w": w})
    assert np.abs(full.params["w"] - w).max() > 1e-3
    np.testing.assert_allclose(w + low.params["a"] @ low.params["b"], full.params["w"], rtol=1e-5)
    # The same where the batch comes in pieces.
    pieces = make_train_step(linear_loss, optimizer, num_microbatches=4)
    cut, _ = pieces(create_state(optimizer, trained), batch, frozen={"w": w})
    np.testing.assert_allclose(cut.params["b"], low.params["b"], rtol=1e-5)
    # And half the rank is something else.
    half = {"a": a[:, :2], "b": jnp.zeros((2, 3))}
    other, _ = step(create_state(optimizer, half), batch, frozen={"w": w})
    assert np.abs(other.params["a"] @ other.params["b"] - (full.params["w"] - w)).max() > 1e-3


def test_the_state_holds_adapters_alone_and_weights_that_are_frozen_cost_no_gradient():
    arch = replace(LLAMA, hidden_size=128, intermediate_size=256, head_dim=32, vocab_size=512)
    shapes = jax.eval_shape(lambda: (base_of(arch), adapters(arch)))
    base, (trained, scale) = shapes[0], shapes[1].values()
    seq_logp = make_seq_logp(arch)

    def flops(params: Params, frozen: Params | None) -> float:
        loss = lambda params, frozen: seq_logp(joined(frozen, params), BATCH).sum()
        compiled = jax.jit(jax.grad(loss)).lower(params, frozen).compile()
        cost: Any = compiled.cost_analysis()
        return cost["flops"]

    full = flops(base, None)
    low = flops({"lora": trained}, base | {"lora_scale": scale})
    # Forward and the gradient of activations, without that of weights; and adapters, of rank 3.
    assert 0.6 < low / full < 0.75
    state = create_state(optax.adam(1e-3), {"lora": adapters(arch)["lora"]})
    numbers = sum(leaf.size for leaf in jax.tree.leaves(trained))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 3 * numbers + 3


def test_ranks_and_targets_that_mean_nothing_are_refused_with_what_there_is():
    for names in (["q_prj"], ["lm_head"], []):
        with pytest.raises(InputError) as caught:
            lora.find_targets(names)
        toys.names_all(str(caught.value), ["lora.targets", *lora.TARGETS, *names])
    assert lora.find_targets(["v_proj", "q_proj"]) == ("q_proj", "v_proj")
    lora.check_rank(LLAMA, 7, lora.TARGETS)
    with pytest.raises(InputError, match=r"lora\.rank: wanted less than 8.*k_proj.*got 8"):
        lora.check_rank(LLAMA, 8, lora.TARGETS)  # two heads of four

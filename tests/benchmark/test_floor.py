"""What sharing, packing and logits at completions only save, in the compiler's own numbers.

The plain formulation runs every completion as a sequence of its own, [prompt | completion] padded
to the longest, with logits at every position. Its ln π_ref is known too, as in ours.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from copg_jax import losses
from copg_jax.data import groups
from copg_jax.data.groups import GroupBatch, TokenGroup
from copg_jax.models.decoder import Decoder
from copg_jax.models.forward import make_seq_logp, predictive_hidden
from copg_jax.models.layout import GroupPacking
from copg_jax.models.params import Architecture, abstract_params, init_params
from copg_jax.objective import make_policy_loss
from copg_jax.train.state import abstract_state
from experiments.benchmark import train
from experiments.benchmark.cost import compile_cost
from experiments.benchmark.workload import MODELS, Workload, read_workload, write_workload
from tests.toys import LLAMA, mesh

pytestmark = pytest.mark.slow

BATCH = 8
BETA = train.ARGUMENTS["beta"]


class Plain(NamedTuple):
    """2B sequences, as groups whose prompt is the first token and whose completion all others."""

    sequences: GroupBatch  # 2B groups of one completion
    scored: Any  # bool [2B, T - 1]: predictions of completion tokens
    reward: Any  # [B, 2]


def plain_batch(rows: list[TokenGroup]) -> Plain:
    pairs = [(row.prompt_tokens, ids) for row in rows for ids in row.completion_tokens]
    whole = [np.concatenate(pair) for pair in pairs]
    sequences = [
        replace(rows[0], prompt_tokens=ids[:1], completion_tokens=(ids[1:],), rewards=None)
        for ids in whole
    ]
    size = -(-max(map(len, whole)) // 8) * 8
    batch = groups.collate([replace(row, ref_logps=None) for row in sequences], 1, 1, size - 1)
    first = np.array([len(prompt) for prompt, _ in pairs])[:, None] - 1
    last = np.array([len(ids) for ids in whole])[:, None] - 1
    position = np.arange(size - 1)[None, :]
    scored = (position >= first) & (position < last)
    return Plain(batch, scored, np.stack([row.rewards for row in rows]))


def plain_loss(arch: Architecture, params: Any, batch: Plain) -> jax.Array:
    """Mean CoPG loss."""
    decoder = Decoder(arch)
    group = GroupPacking.of(batch.sequences)
    hidden = predictive_hidden(decoder, params, batch.sequences, group)
    logits = jnp.einsum("...d,dv->...v", hidden, decoder.output_matrix(params))
    tokens = batch.sequences.completion_tokens.reshape(hidden.shape[:-1])
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
    seq_logp = jnp.where(batch.scored, logp.reshape(batch.scored.shape), 0.0).sum(-1)
    return losses.copg_loss(seq_logp.reshape(-1, 2), batch.reward, beta=BETA).mean()


def plain_step(arch: Architecture, optimizer: optax.GradientTransformation) -> Any:
    """Jitted (params, opt_state, batch, learning_rate) → (params, opt_state, loss)."""

    update = optax.with_extra_args_support(optimizer).update

    def run(params: Any, opt_state: Any, batch: Plain, learning_rate: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: plain_loss(arch, p, batch))(params)
        updates, opt_state = update(grads, opt_state, params, learning_rate=learning_rate)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(run, donate_argnums=(0, 1))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Workload:
    path = tmp_path_factory.mktemp("floor") / "w.jsonl"
    write_workload(path, num_pairs=BATCH)
    return read_workload(path, vocab_size=32000)


def test_the_plain_formulation_is_the_same_loss():
    rng = np.random.default_rng(0)
    draw = lambda: rng.integers(0, LLAMA.vocab_size, rng.integers(2, 9)).astype(np.int32)
    rows = [
        TokenGroup("", "", "", draw(), ("", ""), (draw(), draw()), rng.normal(size=2))
        for _ in range(4)
    ]
    params = init_params(LLAMA, jax.random.key(0))
    (batch,) = train.make_batches(Workload(rows), 4, 1, 1)
    loss_fn = make_policy_loss(make_seq_logp(LLAMA), losses.copg_loss)
    ours = jax.jit(lambda p: loss_fn(p, batch, beta=BETA).per_group)(params).mean()
    plain = jax.jit(lambda p: plain_loss(LLAMA, p, plain_batch(rows)))(params)
    np.testing.assert_allclose(plain, ours, rtol=1e-5)


def test_a_step_takes_a_quarter_of_the_operations_and_a_third_of_the_memory(rows):
    arch, optimizer = replace(MODELS["small"], remat="none"), train.make_optimizer()
    state = abstract_state(optimizer, abstract_params(arch))
    step_fn, _ = train.make_step(train.make_model(arch, mesh()), optimizer)
    (batch,) = train.make_batches(rows, BATCH, 1, 1)
    ours = compile_cost(step_fn, state, batch, **train.ARGUMENTS)
    plain = compile_cost(
        plain_step(arch, optimizer),
        state.params,
        state.opt_state,
        plain_batch(list(rows)),
        train.ARGUMENTS["learning_rate"],
    )
    assert ours.flops <= 0.25 * plain.flops
    assert ours.temp_bytes <= 0.35 * plain.temp_bytes

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
from copg_jax.models.decoder import output_matrix
from copg_jax.models.forward import predictive_hidden
from copg_jax.models.params import Architecture, abstract_params, init_params
from copg_jax.train import state as train_state
from copg_jax.train import step
from experiments.benchmark import train
from experiments.benchmark.cost import compile_cost
from experiments.benchmark.workload import MODELS, Workload, read_workload, write_workload
from tests.toys import LLAMA, mesh

BETA = 0.06
BATCH = 8


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
    batch = groups.collate(
        [replace(row, ref_logps=None) for row in sequences],
        batch_size=len(sequences),
        prompt_sizes=(1,) * len(sequences),
        num_completions=1,
        completion_size=size - 1,
    )
    first = np.array([len(prompt) for prompt, _ in pairs])[:, None] - 1
    last = np.array([len(ids) for ids in whole])[:, None] - 1
    position = np.arange(size - 1)[None, :]
    scored = (position >= first) & (position < last)
    return Plain(batch, scored, np.stack([row.rewards for row in rows]))


def plain_loss(config: Architecture, params: Any, batch: Plain) -> jax.Array:
    """Mean CoPG loss."""
    hidden = predictive_hidden(config, params, batch.sequences)
    matrix = output_matrix(config, params)
    logits = jnp.einsum("...d,dv->...v", hidden, matrix)
    tokens = batch.sequences.completion_tokens.reshape(hidden.shape[:-1])
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
    seq_logp = jnp.where(batch.scored, logp.reshape(batch.scored.shape), 0.0).sum(-1)
    return losses.copg_loss(seq_logp.reshape(-1, 2), batch.reward, beta=BETA).mean()


def plain_step(config: Architecture, optimizer: optax.GradientTransformation) -> Any:
    """Jitted (params, opt_state, batch) → (params, opt_state, loss)."""

    def run(params: Any, opt_state: Any, batch: Plain) -> Any:
        loss, grads = jax.value_and_grad(lambda p: plain_loss(config, p, batch))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
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
    loss_fn = step.make_policy_loss(LLAMA, "copg", beta=BETA)
    ours = jax.jit(lambda p: loss_fn(p, batch)[1].per_group)(params).mean()
    plain = jax.jit(lambda p: plain_loss(LLAMA, p, plain_batch(rows)))(params)
    np.testing.assert_allclose(plain, ours, rtol=1e-5)


def test_a_step_takes_a_quarter_of_the_operations_and_a_third_of_the_memory(rows):
    config, optimizer = replace(MODELS["small"], remat="none"), train.make_optimizer()
    state = train_state.abstract_state(optimizer, abstract_params(config))
    step_fn, _ = train.make_step(config, optimizer, mesh=mesh())
    (batch,) = train.make_batches(rows, BATCH, 1, 1)
    ours = compile_cost(step_fn, state, batch)
    plain = compile_cost(
        plain_step(config, optimizer), state.params, state.opt_state, plain_batch(list(rows))
    )
    assert ours.flops <= 0.25 * plain.flops
    assert ours.temp_bytes <= 0.35 * plain.temp_bytes

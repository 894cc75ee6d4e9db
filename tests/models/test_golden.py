"""The model equals the Hugging Face torch model, through recorded arrays and torch itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from copg_jax.hf import names, weights
from copg_jax.models.decoder import Decoder
from copg_jax.models.forward import make_score, make_seq_logp
from copg_jax.models.params import Architecture, Params
from copg_jax.objective import make_nll_loss
from copg_jax.sampling import make_sampler, row_keys
from tests import toys
from tests.models import record_golden, tiny
from tests.models.record_golden import NEW_TOKENS, PROMPT

KINDS = pytest.mark.parametrize("kind", tiny.KINDS)
# The others compute as one of these does: their tests take longer than they tell.
_TELLING = ("llama3", "qwen2", "qwen3", "smollm3")
FEW_KINDS = pytest.mark.parametrize(
    "kind",
    [k if k in _TELLING else pytest.param(k, marks=pytest.mark.slow) for k in tiny.KINDS],
)


def _model(folder: Path, kind: str, head: str = "lm") -> tuple[Any, Architecture, Params]:
    """The recorded arrays, and our model of the same checkpoint."""
    tiny.write_checkpoint(folder, kind, head)
    arch = weights.read_architecture(folder)
    golden = np.load(record_golden.FOLDER / f"{kind}.npz")
    return golden, arch, weights.load_params(folder, arch, head=head)


@KINDS
def test_logits_equal_the_hugging_face_model(kind: str, tmp_path: Path) -> None:
    golden, arch, params = _model(tmp_path, kind)
    tokens, _ = record_golden.inputs()
    hidden = tiny.predictive(arch, params, tiny.group_of(tokens, PROMPT))[:, 0]
    logits = tiny.logits(hidden, Decoder(arch).output_matrix(params))
    np.testing.assert_allclose(logits, golden["logits"][:, PROMPT - 1 : -1], atol=1e-4)


@FEW_KINDS
def test_log_probabilities_and_a_step_of_sft_equal_the_hugging_face_model(
    kind: str, tmp_path: Path
) -> None:
    golden, arch, params = _model(tmp_path, kind)
    tokens, lengths = record_golden.inputs()
    group = tiny.group_of(tokens, PROMPT, lengths)
    seq_logp = make_seq_logp(replace(arch, remat="none"))  # compiles sooner

    def loss(params: Params) -> tuple[jax.Array, jax.Array]:
        out = make_nll_loss(seq_logp)(params, group)
        return out.total / out.weight, -out.per_group  # a group has one completion

    gradients, logp = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logp, golden["logp"], atol=1e-4)
    found = {
        name: names.to_hf(tensor, weights.fetch(gradients, tensor))
        for name, tensor in names.hf_tensors(arch, head="lm").items()
    }
    np.testing.assert_allclose(record_golden.sketch(found), golden["gradients"], atol=1e-4)


@FEW_KINDS
def test_greedy_tokens_equal_those_of_generate(kind: str, tmp_path: Path) -> None:
    golden, arch, params = _model(tmp_path, kind)
    tokens, lengths = record_golden.inputs()
    sampler = make_sampler(
        arch, end_ids=(), max_new_tokens=NEW_TOKENS, temperature=0.0, mesh=toys.mesh()
    )
    samples = sampler(params, tokens, lengths, None, row_keys(0, 0, len(lengths)))
    np.testing.assert_array_equal(samples.tokens[:, 0], golden["greedy"])


@KINDS
def test_rewards_equal_the_hugging_face_sequence_classifier(kind: str, tmp_path: Path) -> None:
    golden, arch, params = _model(tmp_path, kind, "score")
    tokens, lengths = record_golden.inputs()
    rows = record_golden.padded(tokens, lengths)
    group = tiny.group_of(rows, PROMPT, lengths)
    ours = jax.jit(make_score(arch))(params, group)
    np.testing.assert_allclose(ours[:, 0], golden["rewards"], atol=1e-4)


@pytest.mark.oracle("torch")
@KINDS
def test_recorded_arrays_are_what_torch_gives_today(kind: str, tmp_path: Path) -> None:
    golden = np.load(record_golden.FOLDER / f"{kind}.npz")
    for name, value in record_golden.record(kind, tmp_path).items():
        np.testing.assert_allclose(value, golden[name], atol=record_golden.BETWEEN_PROCESSORS)

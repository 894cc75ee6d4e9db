"""The model equals the Hugging Face torch model, through recorded arrays and torch itself."""

from pathlib import Path

import jax
import numpy as np
import pytest

from copg_jax.hf import weights
from copg_jax.models.decoder import Decoder
from copg_jax.models.forward import make_score
from tests.models import record_golden, tiny

PROMPT = 5


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_logits_equal_the_hugging_face_model(kind: str, tmp_path: Path) -> None:
    golden = np.load(record_golden.FOLDER / f"{kind}.npz")["logits"]
    tokens, _ = record_golden.inputs()
    tiny.write_checkpoint(tmp_path, kind)
    arch = weights.read_architecture(tmp_path)
    params = weights.load_params(tmp_path, arch, head="lm")
    hidden = tiny.predictive(arch, params, tiny.group_of(tokens, PROMPT))[:, 0]
    logits = tiny.logits(hidden, Decoder(arch).output_matrix(params))
    np.testing.assert_allclose(logits, golden[:, PROMPT - 1 : -1], atol=1e-4)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_rewards_equal_the_hugging_face_sequence_classifier(kind: str, tmp_path: Path) -> None:
    golden = np.load(record_golden.FOLDER / f"{kind}.npz")["rewards"]
    tokens, lengths = record_golden.inputs()
    rows = record_golden.padded(tokens, lengths)
    tiny.write_checkpoint(tmp_path, kind, "score")
    arch = weights.read_architecture(tmp_path)
    params = weights.load_params(tmp_path, arch, head="score")
    group = tiny.group_of(rows, PROMPT, lengths)
    ours = jax.jit(make_score(arch))(params, group)
    np.testing.assert_allclose(ours[:, 0], golden, atol=1e-4)


@pytest.mark.oracle("torch")
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_recorded_arrays_are_what_torch_gives_today(kind: str, tmp_path: Path) -> None:
    golden = np.load(record_golden.FOLDER / f"{kind}.npz")
    for name, value in record_golden.record(kind, tmp_path).items():
        np.testing.assert_allclose(value, golden[name], atol=1e-5)

"""What we export, torch runs with the same numbers; what torch exports, we run."""

import importlib
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
import transformers

from copg_jax.hf import weights
from copg_jax.hf.config_json import read_config
from copg_jax.models.decoder import Decoder
from copg_jax.models.forward import make_score
from copg_jax.models.params import Architecture, Params, init_params
from tests.models import record_golden, tiny

pytestmark = pytest.mark.oracle("torch")
kinds = pytest.mark.parametrize("kind", tiny.KINDS)


@pytest.fixture
def torch() -> ModuleType:
    """The oracle."""
    return importlib.import_module("torch")


def _export(folder: Path, kind: str, head: str) -> tuple[Architecture, Params, Path]:
    """A model that was drawn anew, and the folder that it is exported to."""
    source = tiny.write_checkpoint(folder / "source", kind)
    arch = weights.read_architecture(source)
    params = init_params(arch, jax.random.key(0), head=head)
    noise = np.random.default_rng(0)  # on norms and biases too
    params = jax.tree.map(
        lambda x: (x if x.ndim < 2 else 5 * x) + 0.1 * noise.standard_normal(x.shape, np.float32),
        params,
    )
    weights.save_pretrained(
        folder / "model",
        arch,
        params,
        head=head,
        tokenizer=tiny.tokenizer(),
        source=read_config(source),
    )
    return arch, params, folder / "model"


def _our_rewards(arch, params, rows, lengths):
    cut = 5
    group = tiny.group_of(rows, cut, lengths)
    return jax.jit(make_score(arch))(params, group)[:, 0]


@kinds
def test_torch_gives_the_logits_of_an_exported_language_model(
    kind: str, tmp_path: Path, torch: ModuleType
) -> None:
    arch, params, folder = _export(tmp_path, kind, "lm")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == tiny.class_name(kind, "lm")
    tokens, _ = record_golden.inputs()
    with torch.no_grad():
        wanted = model(torch.tensor(tokens, dtype=torch.long)).logits[:, 4:-1].numpy()
    hidden = tiny.predictive(arch, params, tiny.group_of(tokens, 5))[:, 0]
    ours = tiny.logits(hidden, Decoder(arch).output_matrix(params))
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


@kinds
def test_torch_gives_the_rewards_of_an_exported_reward_model(
    kind: str, tmp_path: Path, torch: ModuleType
) -> None:
    arch, params, folder = _export(tmp_path, kind, "score")
    tokens, lengths = record_golden.inputs()
    rows = record_golden.padded(tokens, lengths)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model).__name__ == tiny.class_name(kind, "score")
    with torch.no_grad():
        wanted = model(torch.tensor(rows, dtype=torch.long)).logits[:, 0].numpy()
    np.testing.assert_allclose(_our_rewards(arch, params, rows, lengths), wanted, atol=1e-4)


@kinds
def test_we_run_what_transformers_saves(kind: str, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "in", kind, "score")
    auto = transformers.AutoModelForSequenceClassification
    auto.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert (tmp_path / "out" / weights.INDEX_NAME).is_file()
    arch = weights.read_architecture(tmp_path / "out")
    params = weights.load_params(tmp_path / "out", arch, head="score")
    tokens, lengths = record_golden.inputs()
    rows = record_golden.padded(tokens, lengths)
    golden = np.load(record_golden.FOLDER / f"{kind}.npz")["rewards"]
    np.testing.assert_allclose(_our_rewards(arch, params, rows, lengths), golden, atol=1e-4)

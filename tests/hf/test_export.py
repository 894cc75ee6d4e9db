"""What we export, torch runs with the same numbers; what torch exports, we run."""

import importlib
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
import transformers

from copg_jax.hf import weights
from copg_jax.models.decoder import Decoder
from copg_jax.models.forward import make_score
from copg_jax.models.params import Architecture, init_params
from tests.models import record_golden, tiny

pytestmark = pytest.mark.oracle("torch")


@pytest.fixture
def torch() -> ModuleType:
    """The oracle."""
    return importlib.import_module("torch")


def _arch(**changes) -> Architecture:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Architecture(vocab_size=tiny.VOCAB, **{**sizes, **heads, **changes})


def _our_rewards(arch, params, rows, lengths):
    cut = 5
    group = tiny.group_of(rows, cut, lengths)
    return jax.jit(make_score(arch))(params, group)[:, 0]


@pytest.mark.parametrize("tied", [False, True])
def test_torch_gives_the_logits_of_an_exported_language_model(
    tied: bool, tmp_path: Path, torch: ModuleType
) -> None:
    arch = _arch(tie_word_embeddings=tied)
    params = init_params(arch, jax.random.key(0))
    params = jax.tree.map(lambda x: x if x.ndim < 2 else 5 * x, params)
    folder = tmp_path / "model"
    weights.save_pretrained(folder, arch, params, head="lm", tokenizer=tiny.tokenizer())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens, _ = record_golden.inputs()
    with torch.no_grad():
        wanted = model(torch.tensor(tokens, dtype=torch.long)).logits[:, 4:-1].numpy()
    hidden = tiny.predictive(arch, params, tiny.group_of(tokens, 5))[:, 0]
    ours = tiny.logits(hidden, Decoder(arch).output_matrix(params))
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


def test_torch_gives_the_rewards_of_an_exported_reward_model(
    tmp_path: Path, torch: ModuleType
) -> None:
    arch = _arch()
    params = init_params(arch, jax.random.key(0), head="score")
    tokens, lengths = record_golden.inputs()
    rows = record_golden.padded(tokens, lengths)
    folder = tmp_path / "model"
    weights.save_pretrained(folder, arch, params, head="score", tokenizer=tiny.tokenizer())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    with torch.no_grad():
        wanted = model(torch.tensor(rows, dtype=torch.long)).logits[:, 0].numpy()
    np.testing.assert_allclose(_our_rewards(arch, params, rows, lengths), wanted, atol=1e-4)


def test_we_run_what_transformers_saves(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "in", "llama3", "score")
    model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "in")
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert (tmp_path / "out" / weights.INDEX_NAME).is_file()
    arch = weights.read_architecture(tmp_path / "out")
    params = weights.load_params(tmp_path / "out", arch, head="score")
    tokens, lengths = record_golden.inputs()
    rows = record_golden.padded(tokens, lengths)
    golden = np.load(record_golden.FOLDER / "llama3.npz")["rewards"]
    np.testing.assert_allclose(_our_rewards(arch, params, rows, lengths), golden, atol=1e-4)

"""Hugging Face folders: what is read is what was written, by us or by the world."""

import json
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from copg_jax.hf import weights
from copg_jax.models.params import Architecture, RopeScaling, abstract_params, logical_axes
from tests.models import tiny


def _assert_equal(actual, desired):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


def _load(folder, head="lm", **options):
    arch = weights.read_architecture(folder)
    return arch, weights.load_params(folder, arch, head=head, **options)


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_export_gives_back_the_published_tensors_bit_for_bit(kind, head, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "in", kind, head)
    arch, params = _load(tmp_path / "in", head)
    weights.save_pretrained(tmp_path / "out", arch, params, head=head, tokenizer=tiny.tokenizer())
    written = load_file(tmp_path / "out" / "model.safetensors")
    _assert_equal(written, tiny.hf_tensors(kind, head))
    assert weights.read_architecture(tmp_path / "out") == arch
    _assert_equal(_load(tmp_path / "out", head)[1], params)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == tiny.tokenizer().get_vocab()


def test_sharded_folders_read_like_single_files(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "in", "llama3")
    arch, params = _load(tmp_path / "in")
    out = tmp_path / "out"
    weights.save_pretrained(
        out, arch, params, head="lm", tokenizer=tiny.tokenizer(), max_shard_bytes=20_000
    )
    index = json.loads((out / weights.INDEX_NAME).read_text())
    files = {file.name for file in out.glob("*.safetensors")}
    assert files == set(index["weight_map"].values()) and len(files) > 2
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    _assert_equal(_load(out)[1], params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_weights_become_float32_masters(dtype, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "tied", dtype=dtype)
    _, params = _load(tmp_path)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    wanted = tiny.hf_tensors("tied", "lm")["model.embed_tokens.weight"].astype(dtype)
    np.testing.assert_array_equal(params["embed_tokens"], wanted.astype(np.float32))


def _shardings(arch, head):
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    table = {
        "embed": "x",
        "heads": "y",
        "kv_heads": "y",
        "head_dim": "z",
        "mlp": "y",
        "vocab": None,
    }

    def place(axes):
        spec = jax.sharding.PartitionSpec(*(table.get(axis) for axis in axes))
        return jax.sharding.NamedSharding(mesh, spec)

    axes = logical_axes(arch, head=head)
    return jax.tree.map(place, axes, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize("head", ["lm", "score"])
def test_sharded_loading_equals_plain_loading(head, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "llama3", head)
    arch, plain = _load(tmp_path, head)
    shardings = _shardings(arch, head)
    _, sharded = _load(tmp_path, head, shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, sharded) == shardings
    _assert_equal(jax.tree.map(np.asarray, sharded), jax.tree.map(np.asarray, plain))


def test_sharded_loading_reads_each_part_once(tmp_path: Path, monkeypatch) -> None:
    tiny.write_checkpoint(tmp_path, "llama3")
    reads: dict[str, list[int]] = {}
    read = weights.SafetensorsFolder.read

    def counting_read(self, name, index):
        part = read(self, name, index)
        reads.setdefault(name, []).append(part.size)
        return part

    monkeypatch.setattr(weights.SafetensorsFolder, "read", counting_read)
    arch = weights.read_architecture(tmp_path)
    weights.load_params(tmp_path, arch, head="lm", shardings=_shardings(arch, "lm"))
    whole = tiny.hf_tensors("llama3", "lm")
    # mlp over 2, embed over 2: four parts of a quarter, for 8 devices.
    name = "model.layers.1.mlp.up_proj.weight"
    assert reads[name] == [whole[name].size // 4] * 4
    assert max(reads["model.embed_tokens.weight"]) == whole["model.embed_tokens.weight"].size // 2


def test_reading_and_writing_take_the_host_memory_of_a_tensor_and_not_of_the_model(
    tmp_path,
) -> None:
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 64, "intermediate_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    arch = Architecture(num_hidden_layers=24, **sizes, **heads)
    shardings = _shardings(arch, "lm")
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(arch))
    params = jax.device_put(zeros, shardings)
    model = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    options = {"head": "lm", "shardings": shardings}

    def write():
        weights.save_pretrained(tmp_path / "m", arch, params, head="lm", tokenizer=tiny.tokenizer())

    def read():
        jax.block_until_ready(weights.load_params(tmp_path / "m", arch, **options))

    for run in (write, read):
        run()  # compiles
        # Of what the process allocates, only NumPy's arrays and Python's objects: on CPU the
        # shards lie in memory of the host too.
        tracemalloc.start()
        run()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 0.1 * model


def test_a_language_model_becomes_a_reward_model_with_a_fresh_head(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "llama2")
    arch, params = _load(tmp_path, "score", init_missing_score=jax.random.key(0))
    assert "lm_head" not in params and params["score"].shape == (arch.hidden_size,)
    _assert_equal(params["layers"], _load(tmp_path)[1]["layers"])


def test_old_and_new_rope_settings_mean_the_same(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "llama3")
    old = weights.read_architecture(tmp_path)
    assert old.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64) and old.rope_theta == 10000.0
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["rope_parameters"] = {**raw.pop("rope_scaling"), "rope_theta": raw.pop("rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert weights.read_architecture(tmp_path) == old


def test_llama_2_configs_without_rope_settings_get_the_default(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "llama2")
    raw = json.loads((tmp_path / "config.json").read_text())
    for field in ("rope_theta", "rope_scaling", "num_key_value_heads"):
        del raw[field]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    arch = weights.read_architecture(tmp_path)
    assert (arch.rope_theta, arch.rope_scaling, arch.num_key_value_heads) == (1e4, None, 4)


@pytest.mark.parametrize(
    ("pad_token", "unk_token", "pad_id"),
    [("<pad>", "<unk>", 2), ("<eos>", "<unk>", 0), (None, "<unk>", 0), (None, None, None)],
)
def test_an_export_pads_with_a_special_token_that_is_not_eos_or_not_at_all(
    pad_token, unk_token, pad_id, tmp_path: Path
) -> None:
    arch, params = _load(tiny.write_checkpoint(tmp_path / "in", "tied", "score"), "score")
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token, tokenizer.unk_token = pad_token, unk_token
    out = tmp_path / "out"
    weights.save_pretrained(out, arch, params, head="score", tokenizer=tokenizer)
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == pad_id
    written = AutoTokenizer.from_pretrained(out)
    assert written.pad_token_id == pad_id
    assert written.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert tokenizer.pad_token == pad_token


def test_hash_follows_the_weights_and_not_the_place(tmp_path: Path) -> None:
    one = tiny.write_checkpoint(tmp_path / "one", "llama2")
    two = tiny.write_checkpoint(tmp_path / "two", "llama2")
    assert weights.params_hash(one) == weights.params_hash(two)
    tiny.write_checkpoint(two, "llama2", dtype=np.float16)
    assert weights.params_hash(one) != weights.params_hash(two)

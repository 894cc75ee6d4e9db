"""Broken model folders: one error that says what was wanted, what was got and how to fix it."""

import functools
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from copg_jax import checksums
from copg_jax.errors import InputError
from copg_jax.hf import weights
from copg_jax.models.decoder import inverse_frequencies
from tests.models import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_checkpoint(tmp_path / "model", "llama3")


def _edit_config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))


def _edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _load(folder: Path, head: str = "lm"):
    return weights.load_params(folder, weights.read_architecture(folder), head=head)


def test_missing_surplus_and_misshapen_tensors_are_reported_together(folder: Path) -> None:
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        tensors["model.norm.weight"] = np.zeros(31, np.float32)

    _edit_tensors(folder, change)
    with pytest.raises(InputError) as error:
        _load(folder)
    text = str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.weight (48, 32)" in text
    assert "surplus: model.layers.0.self_attn.q_proj.bias (32,)" in text
    assert "misshapen: model.norm.weight: wanted (32,), got (31,)" in text
    assert str(folder) in text


def test_old_rotary_buffers_are_no_surplus_unless_they_say_something_else(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    right = inverse_frequencies(weights.read_architecture(folder))
    for stored in (right.astype(np.float32), right.astype(np.float16)):
        _edit_tensors(folder, lambda tensors, it=stored: tensors.update({name: it}))
        assert _load(folder)
    for wrong in (np.zeros_like(right, np.float32), right[:-1].astype(np.float32)):
        _edit_tensors(folder, lambda tensors, it=wrong: tensors.update({name: it}))
        with pytest.raises(InputError, match=r"inv_freq: wanted the frequencies that config.json"):
            _load(folder)


@pytest.mark.parametrize("difference", [0.0, 1e-3, np.nan])
def test_a_stored_copy_of_the_tied_embedding_has_to_be_one(tmp_path: Path, difference) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model", "tied")

    def change(tensors):
        copy = tensors["model.embed_tokens.weight"].copy()
        copy[3, 5] += np.asarray(difference, copy.dtype)
        tensors["lm_head.weight"] = copy

    _edit_tensors(folder, change)
    if difference == 0.0:
        assert _load(folder)
        return
    with pytest.raises(InputError, match=r"lm_head.weight: wanted the embedding.*other numbers"):
        _load(folder)


def test_a_language_model_is_no_reward_model_unless_asked(folder: Path) -> None:
    with pytest.raises(InputError, match=r"missing: score.weight \(1, 32\)"):
        _load(folder, "score")


def test_a_reward_model_is_no_language_model(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path, "llama2", "score")
    with pytest.raises(InputError, match=r"missing: lm_head.weight"):
        _load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="never read"):
        _load(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / weights.INDEX_NAME).write_text(json.dumps(index))
    (folder / weights.SINGLE_NAME).unlink()
    with pytest.raises(InputError, match="model-00002-of-00002"):
        _load(folder)


def _shard(folder: Path, **weight_map: str) -> None:
    """Two shards of the tensors and their index, with some of its entries exchanged."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {name: file for file, own in files.items() for name in own}
    given = {name.replace("__", "."): file for name, file in weight_map.items()}
    (folder / weights.INDEX_NAME).write_text(json.dumps({"weight_map": index | given}))


def test_weights_in_one_file_beside_those_of_an_index_are_refused(folder: Path) -> None:
    single = (folder / weights.SINGLE_NAME).read_bytes()
    _shard(folder)
    assert _load(folder)
    (folder / weights.SINGLE_NAME).write_bytes(single)
    with pytest.raises(InputError, match=r"model.safetensors and .*index.json.*wanted one set"):
        _load(folder)


def test_a_tensor_that_is_not_in_the_file_of_the_index_is_named(folder: Path) -> None:
    _shard(folder, model__norm__weight="a.safetensors")
    with pytest.raises(InputError, match=r"b.safetensors: model.norm.weight: .* in a.safetensors"):
        _load(folder)


def test_a_tensor_that_is_in_two_files_is_named(folder: Path) -> None:
    _shard(folder)
    first = load_file(folder / "a.safetensors")
    rest = load_file(folder / "b.safetensors")
    save_file(rest | dict(list(first.items())[:1]), folder / "b.safetensors")
    with pytest.raises(InputError, match=r"b.safetensors: .*wanted each tensor in one file"):
        _load(folder)


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "sub/b.safetensors", "/b.safetensors", "b.bin", "..", 3, None],
)
def test_an_index_that_leaves_its_folder_is_refused(folder: Path, file) -> None:
    _shard(folder, model__norm__weight=file)
    with pytest.raises(InputError, match=r"index.json: model.norm.weight: wanted the name of a "):
        _load(folder)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(folder: Path, text: str) -> None:
    (folder / weights.INDEX_NAME).write_text(text)
    with pytest.raises(InputError, match="weight_map"):
        _load(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="not a readable safetensors"):
        _load(folder)


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("model.norm.weight", np.int8, "I8"),
        ("model.layers.0.self_attn.q_proj.qweight", np.int32, "I32"),  # GPTQ, AWQ
        ("model.layers.0.mlp.up_proj.weight", np.uint8, "U8"),  # bitsandbytes
        ("model.layers.0.mlp.up_proj.weight", ml_dtypes.float8_e4m3fn, "F8_E4M3"),
    ],
)
def test_quantised_weights_are_refused_where_their_config_does_not_say_so(
    folder: Path, name: str, dtype: type, said: str
) -> None:
    _edit_tensors(folder, lambda tensors: tensors.update({name: np.zeros(32, dtype)}))
    with pytest.raises(InputError, match=rf"{name}.*{said}.*quantised"):
        _load(folder)


def test_missing_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json: wanted a Hugging Face config"):
        _load(folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config.json"):
        _load(folder)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("model_type", "gpt2", "model_type"),
        ("attention_bias", True, "attention_bias"),
        ("mlp_bias", True, "mlp_bias"),
        ("hidden_act", "gelu", "hidden_act"),
        ("quantization_config", {"quant_method": "x"}, "quantization_config"),
        ("hidden_size", 33, "hidden_size"),
        ("num_key_value_heads", 3, "num_key_value_heads"),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, "rope_type"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 2.0}, "low_freq_factor"),
    ],
)
def test_what_this_model_cannot_do_is_refused_by_name(
    folder: Path, field: str, value, named: str
) -> None:
    _edit_config(folder, **{field: value})
    with pytest.raises(InputError, match=named):
        _load(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xff",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        b"<!DOCTYPE html><html>",
    ],
    ids=range(7),
)
def test_a_header_of_garbage_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors: not a readable safetensors file"):
        _load(folder)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/model", "a\0b"])
def test_a_path_that_no_disk_can_have_is_an_input_error(name: str) -> None:
    with pytest.raises(InputError, match="wanted a model folder"):
        weights.resolve(name)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_a_path_that_does_not_exist_is_no_hub_id(name: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        weights.resolve(name)


def test_an_unreachable_hub_id_says_so() -> None:
    with pytest.raises(InputError, match="the hub did not give it"):
        weights.resolve("nobody-at-all/nothing-here")


@pytest.mark.parametrize("name", ["notes.json", "vocab.txt", "model_important.safetensors"])
@pytest.mark.parametrize("is_whole", [True, False])
def test_export_does_not_replace_a_folder_with_a_file_of_something_else(
    folder: Path, name: str, is_whole: bool
) -> None:
    arch = weights.read_architecture(folder)
    params = _load(folder)
    (folder / name).write_text("mine")
    if not is_whole:
        (folder / "config.json").unlink()
    with pytest.raises(InputError, match=f"got other files .*{name}.* choose another folder"):
        weights.save_pretrained(folder, arch, params, head="lm", tokenizer=tiny.tokenizer())
    assert (folder / name).read_text() == "mine"


@pytest.mark.parametrize("left", ["model.safetensors", "tokenizer.json", "checksums.json"])
def test_what_an_interrupted_removal_left_of_a_model_is_replaced(folder: Path, left: str) -> None:
    arch, params = weights.read_architecture(folder), _load(folder)
    export = functools.partial(
        weights.save_pretrained, folder, arch, params, head="lm", tokenizer=tiny.tokenizer()
    )
    export()
    wanted = weights.params_hash(folder)
    for path in folder.iterdir():
        if path.name != left:
            path.unlink()
    export()
    assert weights.params_hash(folder) == wanted
    assert checksums.check(folder, fix="") == {}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_weights_that_have_changed_since_they_were_written_are_refused(
    folder: Path, name: str
) -> None:
    arch, params = weights.read_architecture(folder), _load(folder)
    weights.save_pretrained(folder, arch, params, head="lm", tokenizer=tiny.tokenizer())
    raw = bytearray((folder / name).read_bytes())
    raw[-40] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(InputError, match=rf"{name}: damaged or changed .*checksums.json there"):
        weights.params_hash(folder)
    (folder / checksums.NAME).unlink()  # as a folder of the hub
    assert weights.params_hash(folder)

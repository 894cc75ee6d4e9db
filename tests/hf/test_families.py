"""config.json of each family: read whole, written back whole, and what cannot be done is named."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from copg_jax import checksums
from copg_jax.config.sections import MeshConfig
from copg_jax.data.tokenizer import load_tokenizer, tokenizer_hash
from copg_jax.errors import InputError
from copg_jax.hf import weights
from copg_jax.hf.config_json import read_config
from copg_jax.hf.families import FAMILIES, to_architecture
from copg_jax.hf.pretrained import PretrainedModel
from copg_jax.models.params import Architecture, RopeScaling, abstract_params, init_params
from copg_jax.sharding import make_mesh
from tests.models import tiny
from tests.toys import LLAMA, names_all

SCALING = tiny.KINDS["llama3"]["rope_scaling"]
OF_FAMILY = {tiny.KINDS[kind]["model_type"]: kind for kind in reversed(tiny.KINDS)}


def _config(kind: str, **changes: Any) -> dict[str, Any]:
    return copy.deepcopy(tiny.KINDS[kind]) | changes


def _refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        to_architecture(raw)
    return str(caught.value)


def test_every_family_has_a_tiny_checkpoint():
    assert set(OF_FAMILY) == set(FAMILIES)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("llama2", {}),
        ("mistral", {"sliding_window": 20}),
        ("qwen2", {"qkv_bias": True, "head_dim": 8}),
        ("qwen3", {"qk_norm": True, "head_dim": 16}),
        ("qwen3_tied", {"qk_norm": True, "head_dim": 6}),
        ("smollm3", {"rotary_layers": (True, False, True, False)}),
    ],
)
def test_what_is_particular_to_a_family_is_a_field(kind: str, wanted: dict[str, Any]):
    arch = to_architecture(_config(kind))
    particular = ("qkv_bias", "qk_norm", "rotary_layers", "sliding_window")
    plain = {name: getattr(LLAMA, name) for name in particular} | {"head_dim": 8}
    assert {name: getattr(arch, name) for name in plain} == plain | wanted


# vocabulary, width, MLP, layers, heads, key-value heads, tied or not; what else its config says
_PUBLISHED = {
    "mistral": (
        (32000, 4096, 14336, 32, 32, 8, False),
        {"sliding_window": 4096, "max_position_embeddings": 32768},
        7_241_732_096,  # Mistral-7B-v0.1
    ),
    "qwen2": (
        (152064, 3584, 18944, 28, 28, 4, False),
        {"use_sliding_window": False, "sliding_window": 131072},
        7_615_616_512,  # Qwen2.5-7B
    ),
    "qwen3": ((151936, 1024, 3072, 28, 16, 8, True), {"head_dim": 128}, 596_049_920),  # 0.6B
    "smollm3": ((128256, 2048, 11008, 36, 16, 4, True), {}, 3_075_098_624),  # SmolLM3-3B
}


@pytest.mark.parametrize("model_type", _PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(model_type: str):
    values, others, wanted = _PUBLISHED[model_type]
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
    sizes = dict(zip(names, values, strict=True))
    arch = to_architecture({"model_type": model_type, **sizes, **others})
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(arch))) == wanted


def test_smollm3_has_rotary_positions_in_three_layers_of_four_where_its_config_says_nothing():
    raw = _config("smollm3", num_hidden_layers=8)
    del raw["no_rope_layers"]
    assert to_architecture(raw).rotary_layers == (True, True, True, False) * 2


@pytest.mark.parametrize(
    "model_type", ["gemma2", "gemma3_text", "mixtral", "qwen3_moe", "mistral3", None, ["llama"]]
)
def test_other_families_are_refused_with_those_that_there_are(model_type):
    names_all(_refusal(_config("llama2", model_type=model_type)), ["model_type", *FAMILIES])


@pytest.mark.parametrize("kind", OF_FAMILY.values())
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_quantised_checkpoints_are_refused_by_name(kind: str, method: str):
    text = _refusal(_config(kind, quantization_config={"quant_method": method, "bits": 4}))
    names_all(text, ["quantization_config", repr(method), "Fix"])


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn", "longrope"])
@pytest.mark.parametrize("kind", ["llama2", "mistral", "qwen2"])
def test_other_scalings_of_positions_are_refused_by_name(kind, scaling, key, form):
    rope = {
        key: scaling,
        "factor": 2.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0] * 4,
    }
    raw = _config(kind, **{form: rope})
    raw.pop("rope_theta")
    names_all(_refusal(raw), [f"{form}.{key}", "not supported", repr(scaling)])


@pytest.mark.parametrize("kind", OF_FAMILY.values())
def test_both_forms_of_rotary_settings_mean_the_same(kind: str):
    old = _config(kind, rope_theta=5e5, rope_scaling=SCALING)
    new = _config(kind, rope_parameters={**SCALING, "rope_theta": 5e5})
    for name in ("rope_theta", "rope_scaling"):
        new.pop(name, None)
    arch = to_architecture(old)
    assert arch == to_architecture(new)
    assert (arch.rope_theta, arch.rope_scaling) == (5e5, RopeScaling(8.0, 1.0, 4.0, 64))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {"rope_theta": 1e6}}, ["rope_theta", "1000000.0", "10000.0"]),
        (
            {
                "rope_scaling": SCALING,
                "rope_parameters": {"rope_theta": 1e4},
            },
            ["rope_type", "'default'", "'llama3'"],
        ),
        (
            {
                "rope_scaling": SCALING,
                "rope_parameters": {"type": "llama3", "factor": 8.0, "rope_theta": 1e4},
            },
            ["low_freq_factor", "None", "1.0"],
        ),
        (
            {
                "rope_scaling": {"type": "default"},
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4},
            },
            ["rope_type", "'default'", "'llama3'"],
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            ["rope_parameters", "the same for all layers", "full_attention"],
        ),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    ],
)
def test_rotary_settings_that_say_two_things_or_a_part_are_refused(changes, named):
    names_all(_refusal(_config("llama2", **changes)), named)


@pytest.mark.parametrize(
    ("kind", "changes", "window"),
    [
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 4096}, 4096),
        ("qwen2", {"use_sliding_window": False}, None),
        ("qwen2", {"use_sliding_window": True}, 4),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, None),
        ("qwen3", {"layer_types": ["full_attention"] * 2, "sliding_window": 4}, None),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, 8),
    ],
)
def test_a_window_counts_where_a_layer_has_it(kind, changes, window):
    assert to_architecture(_config(kind, **changes)).sliding_window == window


def test_other_kinds_of_layers_are_refused_by_name():
    raw = _config("qwen3", layer_types=["full_attention", "chunked_attention"])
    names_all(_refusal(raw), ["layer_types[1]", "not supported", "'chunked_attention'"])


@pytest.mark.parametrize(
    ("field", "value"), [("sliding_window", 16), ("no_rope_layers", [1, 0, 1, 0])]
)
@pytest.mark.parametrize("kind", OF_FAMILY.values())
def test_what_transformers_does_not_read_in_a_family_is_refused_where_it_asks_for_something(
    kind: str, field: str, value: Any
):
    raw = _config(kind, **{field: value})
    if field in FAMILIES[raw["model_type"]].fields:
        assert to_architecture(raw).model_type == raw["model_type"]
    else:
        names_all(_refusal(raw), [f"{field}: wanted null", repr(value)])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_reads_the_fields_of_a_family(model_type: str):
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    listed = {name for family in FAMILIES.values() for name in family.fields}
    assert set(FAMILIES[model_type].fields) == listed & known


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"sliding_window": 20}, ["14", "7", "21 together", "sliding_window=20", "Fix: shorter"]),
        ({"max_position_embeddings": 16}, ["21 together", "max_position_embeddings=16"]),
    ],
)
def test_sequences_longer_than_a_window_or_the_positions_are_refused_with_the_numbers(
    tmp_path: Path, changes, parts
):
    arch = to_architecture(_config("mistral", **changes))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = PretrainedModel(arch, tiny.tokenizer(), tmp_path, {}, "lm", mesh)
    with pytest.raises(InputError) as caught:
        model.require_context("posts.jsonl", 14, 7, fix="shorter texts")
    names_all(str(caught.value), ["posts.jsonl", str(tmp_path), *parts])
    assert model.require_context("posts.jsonl", 9, 7, fix="shorter texts") is None


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("kind", OF_FAMILY.values())
def test_an_export_keeps_what_the_config_of_its_source_says_besides(
    kind: str, head: str, tmp_path: Path
):
    folder = tiny.write_checkpoint(tmp_path / "in", kind, "score" if head == "lm" else "lm")
    raw = read_config(folder)
    besides = {"initializer_range": 0.5, "note": "kept", "use_cache": False, "max_window_layers": 1}
    (folder / "config.json").write_text(json.dumps(raw | besides))
    arch = weights.read_architecture(folder)
    params = init_params(arch, jax.random.key(0), head=head)
    out = tmp_path / "out"
    weights.save_pretrained(
        out, arch, params, head=head, tokenizer=tiny.tokenizer(), source=read_config(folder)
    )
    assert weights.read_architecture(out) == arch
    assert checksums.check(out, fix="") == {}
    written = read_config(out)
    assert {name: written[name] for name in besides} == besides
    assert written["architectures"] == [tiny.class_name(kind, head)]
    assert written["model_type"] == raw["model_type"] and written["dtype"] == "float32"
    assert AutoConfig.from_pretrained(out).num_labels == (1 if head == "score" else 2)
    expected = {"eos_token_id": 1, "pad_token_id": 2}
    assert {name: written[name] for name in expected} == expected


@pytest.mark.parametrize("kind", OF_FAMILY.values())
def test_the_tokenizer_of_an_export_is_the_one_that_was_given(kind: str, tmp_path: Path):
    """Of qwen2, transformers would exchange its class for one with a token more."""
    arch, given = to_architecture(tiny.KINDS[kind]), tiny.tokenizer()
    params = init_params(arch, jax.random.key(0))
    weights.save_pretrained(tmp_path / "out", arch, params, head="lm", tokenizer=given)
    again = load_tokenizer(tmp_path / "out")
    assert again.get_vocab() == given.get_vocab()
    assert tokenizer_hash(again) == tokenizer_hash(given)


@pytest.mark.parametrize(
    "change",
    [
        {"qk_norm": True},
        {"model_type": "qwen2"},
        {"rotary_layers": (True, False)},
        {"model_type": "smollm3"},
    ],
)
def test_a_model_that_no_config_of_its_family_describes_is_not_exported(change, tmp_path: Path):
    arch = Architecture(**vars(LLAMA) | change)
    params = init_params(arch, jax.random.key(0))
    with pytest.raises(InputError, match=f"model_type {arch.model_type}: no config"):
        weights.save_pretrained(
            tmp_path / "out", arch, params, head="lm", tokenizer=tiny.tokenizer()
        )
    assert not (tmp_path / "out").exists()

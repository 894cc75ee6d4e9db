"""config.json of models: what decides something is checked field by field, the rest is not read.

What holds for the fields of all families is shown with a Llama; the fuzz is of every family.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copg_jax.errors import InputError
from copg_jax.hf import weights
from copg_jax.hf.config_json import read_config
from copg_jax.hf.families import FAMILIES, to_architecture, to_config
from tests.models import tiny
from tests.toys import names_all

BASE = tiny.KINDS["llama3"]
ROPE = BASE["rope_scaling"]
HUGE = 10**400  # no float has this size
# Fields that transformers knows, and that say nothing about the architecture of a Llama.
IDLE = {
    "num_labels": 10**12,
    "id2label": 3,
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    "architectures": [3],
    "dtype": "float99",
    "torch_dtype": {},
    "attn_implementation": "evil/kernels",
    "layer_types": 3,
    "pad_token_id": -1,
    "initializer_range": None,
    "transformers_version": [],
}


def write(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def refusal(folder: Path, **changes: Any) -> str:
    write(folder, json.dumps(BASE | changes))
    with pytest.raises(InputError) as caught:
        weights.read_architecture(folder)
    return str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 2.5, HUGE, None, "32", True, [], {}, float("nan")])
@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
def test_a_size_is_a_whole_number_above_zero(tmp_path, field, value):
    text = refusal(tmp_path, **{field: value})
    assert text.startswith(f"{tmp_path / 'config.json'}: {field}: wanted a whole number from 1 to ")
    assert ", got " in text
    assert len(text) < 400


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("num_hidden_layers", 10**9, "from 1 to 10000, got 1000000000"),
        ("num_hidden_layers", 1, "at least 2"),
        ("vocab_size", 10**12, "from 1 to 2147483647, got 1000000000000"),
        ("hidden_size", 33, "num_attention_heads, which is 4, or a head_dim beside it, got 33"),
        ("num_attention_heads", 5, "wanted a multiple of num_attention_heads, which is 5"),
        ("num_key_value_heads", 0, "or null, got 0"),
        ("num_key_value_heads", 3, "must be a multiple of num_key_value_heads (3)"),
        ("head_dim", 7, "requires an even rotary dimension"),
        ("head_dim", "8", "or null, got '8'"),
        ("rms_norm_eps", 0, "got 0"),
        ("rms_norm_eps", -1, "got -1"),
        ("rms_norm_eps", float("nan"), "got nan"),
        ("rms_norm_eps", 1e-50, "got 1e-50"),
        ("rms_norm_eps", None, "got None"),
        ("rope_theta", 0, "got 0"),
        ("rope_theta", float("inf"), "got inf"),
        ("rope_theta", float("nan"), "got nan"),
        ("rope_theta", "10000", "got '10000'"),
        ("tie_word_embeddings", None, "wanted true or false, got None"),
        ("tie_word_embeddings", 1, "wanted true or false, got 1"),
        ("sliding_window", 4096, "wanted null (others are not supported), got 4096"),
        ("partial_rotary_factor", 0.5, "got 0.5"),
        ("attention_bias", 0, "wanted false (others are not supported), got 0"),
        ("hidden_act", None, 'wanted "silu"'),
        ("rope_scaling", [], "wanted an object, the same for all layers or null, got []"),
        ("rope_scaling", ROPE | {"factor": 0}, "rope_scaling.factor: wanted a number from 1"),
        ("rope_scaling", ROPE | {"factor": "8"}, "rope_scaling.factor"),
        ("rope_scaling", ROPE | {"rope_type": []}, "rope_scaling.rope_type"),
        ("rope_scaling", ROPE | {"rope_type": "yarn"}, "rope_scaling.rope_type"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling.type"),
        ("rope_scaling", ROPE | {"high_freq_factor": 1.0}, "must be above low_freq_factor (1.0)"),
        ("rope_parameters", {"rope_theta": None}, "rope_parameters.rope_theta"),
        ("eos_token_id", 61, "wanted ids below vocab_size, which is 61, or null, got 61"),
        ("eos_token_id", [1, -1], "got [1, -1]"),
        ("eos_token_id", "</s>", "got '</s>'"),
    ],
)
def test_what_means_nothing_here_is_refused_with_field_and_value(tmp_path, field, value, wanted):
    text = refusal(tmp_path, **{field: value})
    assert text.startswith(str(tmp_path / "config.json"))
    assert field in text
    assert wanted in text


@pytest.mark.parametrize(
    ("kind", "field", "value", "wanted"),
    [
        ("mistral", "sliding_window", 0, "a whole number from 1 to 2147483647 or null, got 0"),
        ("mistral", "sliding_window", "4096", "or null, got '4096'"),
        ("mistral", "sliding_window", float("nan"), "or null, got nan"),
        ("mistral", "num_key_value_heads", 3, "must be a multiple of num_key_value_heads (3)"),
        ("mistral", "head_dim", 7, "even rotary dimension"),
        ("mistral", "hidden_size", 33, "which is 4, or a head_dim beside it, got 33"),
        ("qwen2", "sliding_window", -1, "or null, got -1"),
        ("qwen2", "use_sliding_window", None, "true or false, got None"),
        ("qwen2", "use_sliding_window", 1, "true or false, got 1"),
        ("qwen2", "max_window_layers", -1, "a whole number from 0 to 2147483647, got -1"),
        ("qwen2", "max_window_layers", "28", "got '28'"),
        ("qwen2", "attention_bias", True, "wanted false (others are not supported), got True"),
        ("qwen3", "head_dim", 0, "or null, got 0"),
        ("qwen3", "attention_bias", True, "wanted false (others are not supported), got True"),
        ("qwen3", "layer_types", "full_attention", "a list or null, got 'full_attention'"),
        ("qwen3", "layer_types", ["full_attention", 3], "layer_types[1]: wanted"),
        (
            "qwen3",
            "layer_types",
            ["full_attention"],
            "wanted one value for each of 2 layers, got 1",
        ),
        ("qwen3", "eos_token_id", 61, "wanted ids below vocab_size, which is 61, or null, got 61"),
        ("smollm3", "no_rope_layers", {}, "a list or null, got {}"),
        ("smollm3", "no_rope_layers", [1, 0, 1, True], "no_rope_layers[3]: wanted 0 or 1"),
        ("smollm3", "no_rope_layers", [1, 0, 2, 0], "no_rope_layers[2]: wanted 0 or 1"),
        ("smollm3", "no_rope_layers", [1, 0], "wanted one value for each of 4 layers, got 2"),
        ("smollm3", "no_rope_layers", [], "wanted one value for each of 4 layers, got 0"),
        ("smollm3", "no_rope_layer_interval", 0, "a whole number from 1 to 2147483647, got 0"),
        ("smollm3", "mlp_bias", True, "wanted false (others are not supported), got True"),
    ],
)
def test_what_means_nothing_in_a_family_is_refused_too(tmp_path, kind, field, value, wanted):
    write(tmp_path, json.dumps(tiny.KINDS[kind] | {field: value}))
    with pytest.raises(InputError) as caught:
        weights.read_architecture(tmp_path)
    names_all(str(caught.value), [str(tmp_path / "config.json"), field, wanted])


def test_what_says_nothing_about_the_architecture_is_not_read(tmp_path):
    wanted = weights.read_architecture(write(tmp_path, json.dumps(BASE)))
    assert weights.read_architecture(write(tmp_path, json.dumps(BASE | IDLE))) == wanted


def test_several_ends_of_a_sequence_are_fine(tmp_path):
    write(tmp_path, json.dumps(BASE | {"eos_token_id": [0, 60]}))
    assert weights.read_architecture(tmp_path).vocab_size == 61


@pytest.mark.parametrize(
    "text",
    ["", "null", "3", "{", "[" * 100_000, '{"model_type": "\\ud800"}', '{"a": ' + "9" * 5000 + "}"],
)
def test_a_file_that_is_no_config_is_named(tmp_path, text):
    with pytest.raises(InputError) as caught:
        weights.read_architecture(write(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match=r"config\.json: wanted JSON"):
        weights.read_architecture(tmp_path)


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_has_to_be_merged_first(tmp_path, whole):
    """Beside a whole model too: whether the adapter belongs to it or is in it, nobody can tell."""
    if whole:
        tiny.write_checkpoint(tmp_path, "llama3")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        weights.read_architecture(tmp_path)
    assert "got an adapter (adapter_config.json). Fix: its base model" in str(caught.value)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.sampled_from([10**12, HUGE, -HUGE]),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.lists(st.integers(0, 1), min_size=2, max_size=4),
    st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=2, max_size=4),
    st.dictionaries(st.sampled_from([*ROPE, "type", "rope_theta", "x"]), st.floats() | st.none()),
)
OF_FAMILY = {config["model_type"]: config for config in tiny.KINDS.values()}
OF_ALL = {*BASE, *IDLE, "head_dim", "rope_parameters", "sliding_window", "partial_rotary_factor"}


@pytest.mark.parametrize("model_type", FAMILIES)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_config_is_read_or_is_an_input_error(tmp_path_factory, model_type, data):
    base = OF_FAMILY[model_type]
    fields = st.sampled_from(sorted({*OF_ALL, *base, *FAMILIES[model_type].fields}))
    changes = data.draw(st.dictionaries(fields, ODD, min_size=1, max_size=3))
    left_out = data.draw(st.sets(fields, max_size=2))
    raw = {k: v for k, v in (base | changes).items() if k not in {"model_type", *left_out}}
    raw |= {"model_type": model_type}
    folder = write(tmp_path_factory.getbasetemp(), json.dumps(raw))
    try:
        arch = weights.read_architecture(folder)
    except InputError as error:
        assert str(folder / "config.json") in str(error)
    else:  # and what is read can be written, whatever else stands there
        config = to_config(arch, head="score", special={}, source=read_config(folder))
        assert to_architecture(json.loads(json.dumps(config))) == arch

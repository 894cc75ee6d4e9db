"""Families of models: the config.json of each as an `Architecture`, and back.

1. `FAMILIES` has a line for each family: what holds for all its models, so that no config says it,
   and which fields its configs have beside those of all families.
2. `to_architecture` gives what a config.json describes; `config_json` has checked its fields.
3. `to_config` gives the config of an export, with all else that stood in the one it came from.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from copg_jax.errors import InputError
from copg_jax.hf.config_json import check_fields
from copg_jax.models.params import Architecture, RopeScaling


class Family(NamedTuple):
    """What tells a family from the others.

    Attributes:
      always: fields of `Architecture` that hold for all its models.
      fields: those of config.json that transformers reads in this family, and not in all.
    """

    always: Mapping[str, Any]
    fields: tuple[str, ...]


_WINDOW = ("sliding_window", "use_sliding_window", "layer_types")
_QWEN = (*_WINDOW, "max_window_layers")
FAMILIES: Mapping[str, Family] = {
    "llama": Family({}, ()),
    "mistral": Family({}, ("sliding_window",)),
    "qwen2": Family({"qkv_bias": True}, _QWEN),
    "qwen3": Family({"qk_norm": True}, _QWEN),
    "smollm3": Family({}, (*_WINDOW, "no_rope_layers", "no_rope_layer_interval")),
}
"""By model_type."""

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
)
_CLASS_NAMES = {
    "lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "score": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
# Of a source, what an export says in another form, what was true of it alone, and names of code.
_NOT_KEPT = {"rope_theta", "rope_scaling", "torch_dtype", "auto_map", "_name_or_path"}
_NOT_KEPT |= {"num_labels", "id2label", "label2id", "attn_implementation"}
_HOW = ("dtype", "attention", "remat")  # fields of `Architecture` that no config.json knows


def to_architecture(raw: Mapping[str, Any]) -> Architecture:
    """What a config.json describes.

    Raises:
        InputError: a field that is not as it has to be, or that asks for a computation which this
            decoder does not have; it is named.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"model_type: wanted one of {', '.join(FAMILIES)}, got {model_type!r:.80}. Fix: a "
            "checkpoint of one of these; other models train from a program of your own "
            "(docs/recipes.md)"
        )
    family = FAMILIES[model_type]
    checked = check_fields(raw, family.fields)
    try:
        hf = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(checked))
    except Exception as error:  # the validation of transformers has its own exception types
        raise InputError(f"transformers refuses it: {error}") from error
    rope_theta, rope_scaling = _read_rope(hf.rope_parameters)
    # In spite of the field's name, 1 is a layer with rotary positions.
    rotary = getattr(hf, "no_rope_layers", None)
    return Architecture(
        **{name: getattr(hf, name) for name in _SIZES},
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rotary_layers=None if rotary is None else tuple(map(bool, rotary[: hf.num_hidden_layers])),
        sliding_window=_read_window(hf),
        model_type=model_type,
        **family.always,
    )


def _read_rope(rope: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the frequencies, from `rope_parameters` in the form of transformers 5."""
    if rope["rope_type"] == "default":
        return float(rope["rope_theta"]), None
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    return float(rope["rope_theta"]), RopeScaling(**{name: rope[name] for name in names})


def _read_window(hf: PreTrainedConfig) -> int | None:
    """How many tokens a token of a windowed layer sees, or None where no layer has a window."""
    kinds = getattr(hf, "layer_types", None)  # None: a family whose layers are all of one kind
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(hf, "sliding_window", None)


def to_config(
    arch: Architecture, *, head: str, special: Mapping[str, Any], source: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of an export.

    Args:
        arch: the model.
        head: "lm" -> the family's ForCausalLM, "score" -> ForSequenceClassification of one label.
        special: ids of special tokens, by the names of their fields.
        source: the config.json that the model came from, whose other fields are kept; or nothing.

    Raises:
        InputError: no config of the family describes such a model.
    """
    fields = FAMILIES[arch.model_type].fields
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": arch.rope_theta}
    if arch.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(arch.rope_scaling)}
    window = {
        "sliding_window": arch.sliding_window,
        "use_sliding_window": arch.sliding_window is not None,
    }
    ours = {
        **{name: getattr(arch, name) for name in (*_SIZES, "head_dim")},
        "model_type": arch.model_type,
        "rope_parameters": rope,
        "architectures": [_CLASS_NAMES[head][arch.model_type]],
        "dtype": "float32",
        **special,
    }
    if arch.rotary_layers is not None and "no_rope_layers" in fields:
        ours["no_rope_layers"] = list(map(int, arch.rotary_layers))
    if head == "score":
        ours |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config = {
        **{name: value for name, value in window.items() if name in fields},
        **{name: value for name, value in source.items() if name not in _NOT_KEPT},
        **ours,
    }
    as_read = to_architecture(config)
    wanted = dataclasses.replace(arch, **{name: getattr(as_read, name) for name in _HOW})
    if as_read != wanted:
        raise InputError(
            f"model_type {arch.model_type}: no config.json of that family describes {wanted}; "
            f"the nearest is {as_read}"
        )
    return config

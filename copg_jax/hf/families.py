"""Families of models: the config.json of each as an `Architecture`, and back.

1. `FAMILIES` has a line for each family: what holds for all its models, so that no config says it.
2. `to_architecture` reads a config.json, or says what in it this decoder cannot compute.
3. `to_config` gives the config of an export, with all else that stood in the one it came from.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from copg_jax.errors import InputError
from copg_jax.models.params import Architecture, RopeScaling

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "smollm3": {},
}
"""By model_type: fields of `Architecture` that hold for the whole family."""

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
_SUPPORTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_LAYER_KINDS = {"full_attention", "sliding_attention"}
_CLASS_NAMES = {
    "lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "score": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
# Of a source, what an export says in another form, or what was true of the source alone.
_NOT_KEPT = {"rope_theta", "rope_scaling", "torch_dtype", "auto_map", "_name_or_path"}
_NOT_KEPT |= {"num_labels", "id2label", "label2id"}
_HOW = ("dtype", "attention", "remat")  # fields of `Architecture` that no config.json knows


def to_architecture(raw: Mapping[str, Any]) -> Architecture:
    """What a config.json describes.

    Raises:
        InputError: a field that is not as `transformers` wants it, or that asks for a computation
            which this decoder does not have; it is named.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(
            f"model_type: wanted one of {', '.join(FAMILIES)}, got {family!r}. Fix: a checkpoint "
            "of one of these; other models train from a program of your own (docs/recipes.md)"
        )
    _refuse_quantised(raw)
    _refuse_two_ropes(raw)
    try:
        hf = CONFIG_MAPPING[family].from_dict(copy.deepcopy(dict(raw)))
    except Exception as error:  # the validation of transformers has its own exception types
        raise InputError(f"transformers refuses it: {error}") from error
    for field, wanted in _SUPPORTED.items():
        if (got := getattr(hf, field, wanted)) != wanted:
            raise InputError(f"{field}: wanted {wanted!r}, got {got!r}, not supported")
    rope_theta, rope_scaling = _read_rope(hf.rope_parameters or {})
    # In spite of the field's name, 1 is a layer with rotary positions.
    rotary = hf.no_rope_layers[: hf.num_hidden_layers] if _knows(hf, "no_rope_layers") else None
    return Architecture(
        **{name: getattr(hf, name) for name in _SIZES},
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // max(hf.num_attention_heads, 1),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rotary_layers=None if rotary is None else tuple(map(bool, rotary)),
        sliding_window=_read_window(hf),
        model_type=family,
        **FAMILIES[family],
    )


def _refuse_quantised(raw: Mapping[str, Any]) -> None:
    for field in ("quantization_config", "compression_config"):
        if (found := raw.get(field)) is not None:
            method = found.get("quant_method", found) if isinstance(found, dict) else found
            raise InputError(
                f"{field}: wanted weights in float32, bfloat16 or float16, got a checkpoint "
                f"quantised by {method!r}. Fix: the checkpoint that it was made from"
            )


def _refuse_two_ropes(raw: Mapping[str, Any]) -> None:
    """`rope_scaling` and `rope_theta` are the form of transformers 4, `rope_parameters` of 5."""
    old, new = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    if isinstance(old, dict) and isinstance(new, dict):
        old = {"rope_theta": raw.get("rope_theta"), "rope_type": old.get("type"), **old}
        for name in old.keys() & new.keys():
            if old[name] is not None and old[name] != new[name]:
                raise InputError(
                    f"rope_parameters: {name} is {new[name]!r}, but {old[name]!r} in the older "
                    "form, rope_theta and rope_scaling. Fix: leave one of the two"
                )


def _read_rope(rope: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the frequencies, from `rope_parameters` in the form of transformers 5."""
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise InputError(
            f"rope_type: wanted 'default' or 'llama3', got {kind!r} (in rope_scaling or "
            "rope_parameters), not supported"
        )
    if (part := rope.get("partial_rotary_factor")) not in (None, 1):
        raise InputError(f"partial_rotary_factor: wanted 1, got {part!r}, not supported")
    nested = any(isinstance(value, Mapping) for value in rope.values())
    if nested or not isinstance(rope.get("rope_theta"), int | float):
        raise InputError(f"rope_parameters: wanted one rope_theta for all layers, got {dict(rope)}")
    if kind == "default":
        return float(rope["rope_theta"]), None
    fields = {field.name for field in dataclasses.fields(RopeScaling)}
    scaling = RopeScaling(**{name: value for name, value in rope.items() if name in fields})
    return float(rope["rope_theta"]), scaling


def _read_window(hf: PreTrainedConfig) -> int | None:
    """How many tokens a token of a windowed layer sees, or None where no layer has a window."""
    if _knows(hf, "layer_types"):  # the others have one kind of layer, whatever a config says
        kinds = set(hf.layer_types)
        if kinds - _LAYER_KINDS:
            wanted = " or ".join(sorted(_LAYER_KINDS))
            got = ", ".join(sorted(kinds - _LAYER_KINDS))
            raise InputError(f"layer_types: wanted {wanted}, got {got}, not supported")
        if "sliding_attention" not in kinds:
            return None
    return getattr(hf, "sliding_window", None)


def _knows(hf: PreTrainedConfig | type[PreTrainedConfig], field: str) -> bool:
    """Whether a field is one of the family's, not only of a file."""
    return field in {known.name for known in dataclasses.fields(hf)}


def to_config(
    arch: Architecture, *, head: str, special: Mapping[str, Any], source: Mapping[str, Any]
) -> PreTrainedConfig:
    """The config of an export.

    Args:
        arch: the model.
        head: "lm" -> the family's ForCausalLM, "score" -> ForSequenceClassification of one label.
        special: ids of special tokens, by the names of their fields.
        source: the config.json that the model came from, whose other fields are kept; or nothing.

    Raises:
        InputError: no config of the family describes such a model.
    """
    family = CONFIG_MAPPING[arch.model_type]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": arch.rope_theta}
    if arch.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(arch.rope_scaling)}
    ours = {
        **{name: getattr(arch, name) for name in (*_SIZES, "head_dim")},
        "model_type": arch.model_type,
        "rope_parameters": rope,
        "architectures": [_CLASS_NAMES[head][arch.model_type]],
        "dtype": "float32",
        **special,
    }
    if arch.rotary_layers is not None:
        ours["no_rope_layers"] = list(map(int, arch.rotary_layers))
    if head == "score":
        ours["num_labels"] = 1
    window = {
        "sliding_window": arch.sliding_window,
        "use_sliding_window": arch.sliding_window is not None,
    }
    defaults = {name: value for name, value in window.items() if _knows(family, name)}
    kept = {name: value for name, value in source.items() if name not in _NOT_KEPT}
    config = family.from_dict(copy.deepcopy({**defaults, **kept, **ours}))
    as_read = to_architecture(config.to_dict())
    wanted = dataclasses.replace(arch, **{name: getattr(as_read, name) for name in _HOW})
    if as_read != wanted:
        raise InputError(
            f"model_type {arch.model_type}: no config.json of that family describes {wanted}; "
            f"the nearest is {as_read}"
        )
    return config

"""config.json of a model folder: read, and reduced to checked fields that decide something.

transformers fills in what is missing. It sees nothing else of the file: some fields it takes on
trust (of `num_labels` it builds a table of that size), others name code (`auto_map`).
What the fields of a family mean is said in `families`.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from copg_jax.config.schema import FLOAT32_MAX, FLOAT32_MIN
from copg_jax.errors import InputError

_Check = tuple[str, Callable[[Any], bool]]  # what is wanted, and whether a value is that
_ADAPTER = "adapter_config.json"


def _whole(most: int, least: int = 1) -> _Check:
    is_one = lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x <= most
    return f"a whole number from {least} to {most}", is_one


def _number(least: float, most: float = FLOAT32_MAX) -> _Check:
    is_one = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and least <= x <= most
    return f"a number from {least:.3g} to {most:.3g}", is_one


def _or_null(check: _Check) -> _Check:
    return f"{check[0]} or null", lambda x: x is None or check[1](x)


def _only(*values: Any) -> _Check:
    wanted = " or ".join(map(json.dumps, values))
    is_one = lambda x: any(
        x == value and isinstance(x, bool) is (value is False) for value in values
    )
    return f"{wanted} (others are not supported)", is_one


def _is(kind: type, wanted: str) -> _Check:
    return wanted, lambda x: isinstance(x, kind)


_SIZE = _whole(2**31 - 1)
_FLAG = _is(bool, "true or false")
_LIST_OR_NULL = _or_null(_is(list, "a list"))
_FLAT_OR_NULL = _or_null(
    (
        "an object, the same for all layers",
        lambda x: isinstance(x, dict) and not any(isinstance(item, dict) for item in x.values()),
    )
)
_FIELDS: dict[str, _Check] = {
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": _whole(10_000),
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _or_null(_SIZE),
    "head_dim": _or_null(_SIZE),
    "max_position_embeddings": _SIZE,
    "rms_norm_eps": _number(FLOAT32_MIN, 1.0),
    "tie_word_embeddings": _FLAG,
    "rope_theta": _number(FLOAT32_MIN),
    "rope_scaling": _FLAT_OR_NULL,
    "rope_parameters": _FLAT_OR_NULL,
}
_OF_SOME_FAMILIES: dict[str, _Check] = {
    "sliding_window": _or_null(_SIZE),
    "use_sliding_window": _FLAG,
    "max_window_layers": _whole(2**31 - 1, least=0),
    "layer_types": _LIST_OR_NULL,
    "no_rope_layers": _LIST_OR_NULL,
    "no_rope_layer_interval": _SIZE,
}
_ITEMS: dict[str, _Check] = {  # of lists
    "layer_types": _only("full_attention", "sliding_attention"),
    "no_rope_layers": _only(0, 1),
}
_ROPE: dict[str, _Check] = {
    "rope_type": _only("default", "llama3"),
    "type": _only("default", "llama3"),
    "rope_theta": _number(FLOAT32_MIN),
    "factor": _number(1.0),
    "low_freq_factor": _number(FLOAT32_MIN),
    "high_freq_factor": _number(FLOAT32_MIN),
    "original_max_position_embeddings": _SIZE,
    "partial_rotary_factor": _only(1.0, None),
}
_UNSUPPORTED: dict[str, _Check] = {  # unless it is a field of the family
    "hidden_act": _only("silu"),
    "attention_bias": _only(False),
    "mlp_bias": _only(False),
    "sliding_window": _only(None),
    "no_rope_layers": _only(None),
    "partial_rotary_factor": _only(1.0, None),
}


def read_config(folder: str | Path) -> dict[str, Any]:
    """Reads config.json as it is; see `check_fields`.

    Raises:
        InputError: no such file, no JSON object, or an adapter without its model.
    """
    file = Path(folder) / "config.json"
    if (file.parent / _ADAPTER).exists():
        raise InputError(
            f"{folder}: wanted a whole model, got an adapter ({_ADAPTER}), which has to be merged "
            "into its base model first: with peft, PeftModel.from_pretrained(base, adapter)."
            f"merge_and_unload().save_pretrained(folder). Where that is done, remove {_ADAPTER}."
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: wanted a Hugging Face config.json, got {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: wanted JSON, got {error}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{file}: wanted a JSON object, got a {type(raw).__name__}")
    return raw


def check_fields(raw: Mapping[str, Any], of_family: Collection[str]) -> dict[str, Any]:
    """Checks the fields of a config.json.

    Args:
        raw: what `read_config` gave.
        of_family: fields that its family has beside those of all families.

    Returns:
        The fields that decide the architecture, of those that are there.

    Raises:
        InputError: a field that has another type or range, that contradicts another one, or that
            asks for what no model here can do. It begins with the field.
    """
    _refuse_quantised(raw)
    fields = _FIELDS | {name: _OF_SOME_FAMILIES[name] for name in of_family}
    _check(raw, _UNSUPPORTED | fields)
    for name in of_family:
        if name in _ITEMS:
            _check_list(raw, name)
    for name in ("rope_scaling", "rope_parameters"):
        _check(raw.get(name) or {}, _ROPE, f"{name}.")
    _refuse_two_ropes(raw)
    _end_ids(raw, raw.get("vocab_size", 2**31))
    width, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if width and heads and width % heads and not raw.get("head_dim"):
        raise InputError(
            f"hidden_size: wanted a multiple of num_attention_heads, which is {heads}, or a "
            f"head_dim beside it, got {width}"
        )
    return {name: raw[name] for name in fields if name in raw}


def _check(values: Mapping[str, Any], checks: Mapping[str, _Check], where: str = "") -> None:
    for name, (wanted, holds) in checks.items():
        if name in values and not holds(values[name]):
            raise InputError(f"{where}{name}: wanted {wanted}, got {_got(values[name])}")


def _check_list(raw: Mapping[str, Any], name: str) -> None:
    """Raises InputError for a list with other items, or without one for each layer."""
    values, layers = raw.get(name), raw.get("num_hidden_layers", 0)
    if values is not None:
        items = {f"{name}[{i}]": item for i, item in enumerate(values)}
        _check(items, dict.fromkeys(items, _ITEMS[name]))
        if len(values) < layers:
            raise InputError(
                f"{name}: wanted one value for each of {layers} layers, got {len(values)}"
            )


def _refuse_quantised(raw: Mapping[str, Any]) -> None:
    for field in ("quantization_config", "compression_config"):
        if (found := raw.get(field)) is not None:
            method = found.get("quant_method", found) if isinstance(found, dict) else found
            raise InputError(
                f"{field}: wanted weights in float32, bfloat16 or float16, got a checkpoint "
                f"quantised by {_got(method)}. Fix: the checkpoint that it was made from"
            )


def _refuse_two_ropes(raw: Mapping[str, Any]) -> None:
    """`rope_theta` and `rope_scaling` are the form of transformers 4, `rope_parameters` of 5."""
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    if not new:
        return
    theta = {"rope_theta": raw.get("rope_theta")}
    older, newer = theta | (_with_type(old) if old else {}), theta | _with_type(new)
    for name, value in older.items():
        if value is not None and newer.get(name) != value:
            raise InputError(
                f"rope_parameters: {name} is {_got(newer.get(name))}, but {_got(value)} in the "
                "older form, rope_theta and rope_scaling. Fix: leave one of the two"
            )


def _with_type(rope: Mapping[str, Any]) -> dict[str, Any]:
    """With `rope_type`, which is `type` in old configs, and "default" where nothing is said."""
    return {"rope_type": rope.get("type", "default")} | {
        k: v for k, v in rope.items() if k != "type"
    }


def read_end_ids(folder: str | Path, config: Mapping[str, Any]) -> list[int]:
    """Reads the ids at which a model's makers end a generation: those of generation_config.json,
    where there is one, else those of config.json, as transformers does; often one, or none.

    Args:
        folder: of the model.
        config: its config.json.

    Raises:
        InputError: the file cannot be read, or has an id that the vocabulary does not have.
    """
    file = Path(folder) / "generation_config.json"
    if not file.exists():
        return _end_ids(config, config.get("vocab_size", 2**31))
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: wanted JSON, got {error}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{file}: wanted a JSON object, got {_got(raw)}")
    try:
        return _end_ids(raw, config.get("vocab_size", 2**31))
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _end_ids(raw: Mapping[str, Any], vocab_size: int) -> list[int]:
    """The end-of-sequence tokens that are named.

    Raises:
        InputError: one that the vocabulary does not have.
    """
    named = raw.get("eos_token_id")
    ids = named if isinstance(named, list) else [named]
    for number in ids:
        is_id = isinstance(number, int) and not isinstance(number, bool)
        if number is not None and not (is_id and 0 <= number < vocab_size):
            raise InputError(
                f"eos_token_id: wanted ids below vocab_size, which is {vocab_size}, or null, got "
                f"{_got(named)}"
            )
    return [number for number in ids if number is not None]


def _got(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python writes no whole numbers of more than 4,300 digits
        return "a number of thousands of digits"

"""config.json of a Llama folder: checked field by field, and reduced to what a model is made of.

transformers fills in what is missing. It sees nothing else of the file: some fields it takes on
trust (of `num_labels` it builds a table of that size), others name code (`auto_map`).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from copg_jax.config.schema import FLOAT32_MAX, FLOAT32_MIN
from copg_jax.errors import InputError

_Check = tuple[str, Callable[[Any], bool]]  # what is wanted, and whether a value is that
_ADAPTER = "adapter_config.json"


def _whole(most: int) -> _Check:
    is_one = lambda x: isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= most
    return f"a whole number from 1 to {most}", is_one


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


_SIZE = _whole(2**31 - 1)
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
    "tie_word_embeddings": ("true or false", lambda x: isinstance(x, bool)),
    "rope_theta": _number(FLOAT32_MIN),
    "rope_scaling": _or_null(("an object", lambda x: isinstance(x, dict))),
    "rope_parameters": _or_null(("an object", lambda x: isinstance(x, dict))),
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
_UNSUPPORTED: dict[str, _Check] = {
    "hidden_act": _only("silu"),
    "attention_bias": _only(False),
    "mlp_bias": _only(False),
    "quantization_config": _only(None),
    "sliding_window": _only(None),
    "partial_rotary_factor": _only(1.0, None),
}


def read_config(folder: Path) -> dict[str, Any]:
    """Reads and checks config.json.

    Returns:
        The fields that decide the architecture, of those that are there.

    Raises:
        InputError: no such file, no Llama, an adapter without its model, or a field that has
            another type or range, or asks for what this model cannot do.
    """
    file = folder / "config.json"
    if (folder / _ADAPTER).exists():
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
    if not isinstance(raw, dict) or raw.get("model_type") != "llama":
        got = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise InputError(
            f"{file}: model_type: wanted 'llama', got {got!r:.80}; use a Llama checkpoint"
        )
    _check(raw, _FIELDS | _UNSUPPORTED, f"{file}: ")
    for name in ("rope_scaling", "rope_parameters"):
        _check(raw.get(name) or {}, _ROPE, f"{file}: {name}.")
    _check_end(raw, file)
    width, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if width and heads and width % heads:
        raise InputError(
            f"{file}: hidden_size: wanted a multiple of num_attention_heads, which is {heads}, got "
            f"{width}"
        )
    return {name: raw[name] for name in _FIELDS if name in raw}


def _check(values: Mapping[str, Any], checks: Mapping[str, _Check], where: str) -> None:
    for name, (wanted, holds) in checks.items():
        if name in values and not holds(values[name]):
            raise InputError(f"{where}{name}: wanted {wanted}, got {_got(values[name])}")


def _check_end(raw: Mapping[str, Any], file: Path) -> None:
    """Raises InputError for an end-of-sequence token that the vocabulary does not have."""
    ids, size = raw.get("eos_token_id"), raw.get("vocab_size", 2**31)
    for number in ids if isinstance(ids, list) else [ids]:
        is_id = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < size
        if number is not None and not is_id:
            raise InputError(
                f"{file}: eos_token_id: wanted ids below vocab_size, which is {size}, or null, got "
                f"{_got(ids)}"
            )


def _got(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python writes no whole numbers of more than 4,300 digits
        return "a number of thousands of digits"

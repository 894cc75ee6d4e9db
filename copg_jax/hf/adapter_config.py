"""adapter_config.json of a PEFT folder: read, checked, and written.

What a LoRA of this decoder cannot mean is refused by its field. Fields that are not known are
refused where they ask for anything: an adapter that is computed in another way would load without a
word.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from copg_jax.config.schema import FLOAT32_MAX, FLOAT32_MIN
from copg_jax.errors import InputError

NAME = "adapter_config.json"

_READ = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "init_lora_weights")
_NO_MATTER = (  # to what a trained adapter computes
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
_KEEP_THE_BASE = (True, False, "gaussian", "orthogonal")  # others subtract from its weights
_HEADS = ("classifier", "score")  # what PEFT always notes of a sequence classifier


class AdapterConfig(NamedTuple):
    """What a LoRA is.

    Attributes:
      rank: r.
      alpha: of the scale alpha / r.
      modules: endings of the names of adapted modules; None where the file has a pattern.
      dropout: of its training.
    """

    rank: int
    alpha: float
    modules: tuple[str, ...] | None
    dropout: float


def read_adapter_config(folder: str | Path, *, head: str) -> AdapterConfig:
    """Reads and checks adapter_config.json.

    Args:
        folder: PEFT folder.
        head: "lm" or "score"; only beside the second a head of its own may be saved.

    Raises:
        InputError: no such file, or a field that is not as it has to be; it is named.
    """
    file = Path(folder) / NAME
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{file}: wanted a PEFT folder with {NAME} and adapter_model.safetensors, got {error}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: wanted JSON, got {error}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{file}: wanted a JSON object, got a {type(raw).__name__}")
    try:
        _check(raw, head)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    modules = raw["target_modules"]
    return AdapterConfig(
        rank=raw["r"],
        alpha=float(raw["lora_alpha"]),
        modules=None if isinstance(modules, str) else tuple(modules),
        dropout=raw.get("lora_dropout") or 0.0,
    )


def adapter_config(
    rank: int, alpha: float, targets: Sequence[str], *, head: str, base: str, revision: str | None
) -> dict[str, Any]:
    """The adapter_config.json of an export; `base` is the name or folder of its base model."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head == "lm" else "SEQ_CLS",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "modules_to_save": None if head == "lm" else ["score"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _check(raw: dict[str, Any], head: str) -> None:
    _require(raw, "peft_type", "LORA", lambda x: x == "LORA")
    is_whole = lambda x: isinstance(x, int) and not isinstance(x, bool) and 1 <= x < 2**31
    _require(raw, "r", "a whole number of at least 1", is_whole)
    is_scale = lambda x: isinstance(x, int | float) and FLOAT32_MIN <= x <= FLOAT32_MAX
    _require(raw, "lora_alpha", "a positive number", is_scale)
    is_texts = lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x)
    is_names = lambda x: isinstance(x, str) or (is_texts(x) and len(x) > 0)
    _require(raw, "target_modules", "a list of names or a pattern", is_names)
    is_share = lambda x: isinstance(x, int | float) and 0 <= x <= 1
    _require(raw, "lora_dropout", "a number from 0 to 1", lambda x: x is None or is_share(x))
    heads = _HEADS if head == "score" else ()
    are_heads = lambda x: x is None or (is_texts(x) and set(x) <= {*heads})
    wanted = f"nothing but {' and '.join(heads)}" if heads else "nothing, for a language model"
    _require(raw, "modules_to_save", wanted, are_heads)
    is_known = lambda x: x is None or any(x is one or x == one for one in _KEEP_THE_BASE)
    wanted = "true, false, gaussian or orthogonal (others change the base model)"
    _require(raw, "init_lora_weights", wanted, is_known)
    for name, value in raw.items():
        if name not in (*_READ, *_NO_MATTER) and not (name == "bias" and value == "none") and value:
            raise InputError(
                f"{name}: wanted nothing, got {value!r:.80}: adapters of that kind are not "
                "supported. Fix: a plain LoRA; or merge it with peft and give the result as "
                "model.path"
            )


def _require(raw: dict[str, Any], name: str, wanted: str, holds: Any) -> None:
    if not holds(raw.get(name)):
        raise InputError(f"{name}: wanted {wanted}, got {raw.get(name)!r:.80}")

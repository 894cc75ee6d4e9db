"""PEFT folders with random adapters, as `peft` writes them; names are spelled out on purpose."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from copg_jax.models.params import Architecture

MODULES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


def tensors(
    arch: Architecture, rank: int, targets: Any = tuple(MODULES), *, score: bool = False
) -> dict[str, np.ndarray]:
    """Random A and B of every layer, by the names that peft gives them."""
    hidden, mlp = arch.hidden_size, arch.intermediate_size
    query = arch.num_attention_heads * arch.head_dim
    key = arch.num_key_value_heads * arch.head_dim
    outputs = {"q_proj": query, "k_proj": key, "v_proj": key, "gate_proj": mlp, "up_proj": mlp}
    inputs = {"o_proj": query, "down_proj": mlp}
    draw = np.random.RandomState(5)
    found = {}
    for layer in range(arch.num_hidden_layers):
        for name in targets:
            where = f"base_model.model.model.layers.{layer}.{MODULES[name]}"
            shapes = (rank, inputs.get(name, hidden)), (outputs.get(name, hidden), rank)
            for factor, shape in zip("AB", shapes, strict=True):
                value = 0.3 * draw.standard_normal(shape).astype(np.float32)
                found[f"{where}.lora_{factor}.weight"] = value
    if score:
        value = draw.standard_normal((1, hidden)).astype(np.float32)
        found["base_model.model.score.weight"] = value
    return found


def config(rank: int, alpha: float, targets: Any = tuple(MODULES), **more: Any) -> dict[str, Any]:
    """The fields that say something."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "bias": "none",
        "use_rslora": False,
        "rank_pattern": {},
        **more,
    }


def write_folder(folder: Path, fields: dict[str, Any], values: dict[str, np.ndarray]) -> Path:
    """Writes a PEFT folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(values, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder

"""What a step has to compute, and what the chips that compute it can do.

1. `useful_flops` counts what the mathematics needs: each prompt once, each completion once, nothing
   for padding, recomputation or the masked half of attention. Divided by time and peak it is the
   MFU.
2. `CHIPS` has the published numbers that a peak or a roofline is taken from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # only its sizes are read: this module needs no jax
    from copg_jax.models.params import Architecture


class Chip(NamedTuple):
    """Published numbers of one chip; rates are 10^9 or 10^12 a second, memory is GiB."""

    peak_tflops: float  # bfloat16 products with float32 sums, dense
    hbm_gib: float  # that a program can have
    hbm_gb_per_sec: float
    link_gb_per_sec: float  # one link, one direction
    source: str


CHIPS: dict[str, Chip] = {
    # A TPU's published interconnect counts both directions of all its links: 400 GB/s = 4 x 2 x 50.
    # Its compiler says what a program can have of the published 32, 16, 95 and 32 GB; of a GPU's 80
    # and 141 GB, or 24 GiB, the driver, the libraries and what is lost between arrays take about a
    # tenth. The link of an RTX 3090 is its PCIe slot.
    "TPU v4": Chip(275, 30.5, 1200, 50, "cloud.google.com/tpu/docs/v4"),
    "TPU v5 lite": Chip(197, 15.75, 819, 50, "cloud.google.com/tpu/docs/v5e"),
    "TPU v5": Chip(459, 95.74, 2765, 100, "cloud.google.com/tpu/docs/v5p"),
    "TPU v6 lite": Chip(918, 31.25, 1638, 100, "cloud.google.com/tpu/docs/v6e"),
    "NVIDIA H100 80GB HBM3": Chip(989, 72, 3350, 450, "nvidia.com/en-us/data-center/h100"),
    "NVIDIA GeForce RTX 3090": Chip(
        71, 21.6, 936, 32, "nvidia.com, GA102 architecture white paper"
    ),
    "NVIDIA H200": Chip(989, 130, 4800, 450, "nvidia.com/en-us/data-center/h200"),
}
"""By `jax.Device.device_kind`; "TPU v5 lite" is v5e, "TPU v5" is v5p, "TPU v6 lite" is v6e."""

PEAK_TFLOPS: dict[str, float] = {kind: chip.peak_tflops for kind, chip in CHIPS.items()}
"""bfloat16 peak by `jax.Device.device_kind`."""


def block_parameters(config: Architecture) -> int:
    """Parameters of all matrices in the decoder layers."""
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * query + 2 * key + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer


def useful_flops(
    config: Architecture,
    prompt_length: np.ndarray,
    completion_length: np.ndarray,
    *,
    training: bool = True,
    head: str = "lm",
    lora_parameters: int | None = None,
) -> float:
    """Σ_groups 6·N_block·(p + Σc) + 12·H·L·(p(p+1)/2 + Σ(c·p + c(c+1)/2)) + 6·d·V·Σc.

    N_block is `block_parameters`, H the width of all query heads, and 6 and 12 are forward (2, 4)
    and backward (4, 8). Where only adapters are trained, frozen matrices have no gradient: 4 in
    place of 6; the adapters' own are 6·N_lora·(p + Σc).

    Args:
        config: architecture.
        prompt_length: tokens; [B].
        completion_length: tokens, EOS included, 0 = absent; [B, K].
        training: with a backward pass; False counts the forward pass alone, a third.
        head: "lm" has logits at every completion token, "score" none (its vector costs nothing).
        lora_parameters: N_lora, those of adapters, which alone are trained; None = all weights are.

    Returns:
        Floating-point operations, all devices together.
    """
    prompt = np.asarray(prompt_length, np.float64)
    completion = np.asarray(completion_length, np.float64)
    own = completion.sum(-1)
    pairs = prompt * (prompt + 1) / 2 + (completion * prompt[:, None]).sum(-1)
    pairs = pairs + (completion * (completion + 1) / 2).sum(-1)
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    matrices = 2 * block_parameters(config) * (prompt + own)
    if head == "lm":
        matrices = matrices + 2 * config.hidden_size * config.vocab_size * own
    others = 4 * width * pairs + 2 * (lora_parameters or 0) * (prompt + own)
    if not training:
        return float((matrices + others).sum())
    return float(((3 if lora_parameters is None else 2) * matrices + 3 * others).sum())

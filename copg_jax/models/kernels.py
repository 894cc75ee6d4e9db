"""Prompt attention by fused kernels, which never write scores to memory, and the choice of one.

1. `choose` says which kernel fits a model on the devices of a mesh.
2. `fused_attention` runs it, on each device for its own groups and heads: `_splash`, a Pallas
   kernel for TPUs, or `_cudnn`, cuDNN's for NVIDIA GPUs.

Inside they pad prompts to blocks of a size that the hardware wants; such padding comes last, so
that no token of a prompt sees it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from copg_jax.config.sections import ATTENTION_CHOICES
from copg_jax.errors import InputError
from copg_jax.models.layout import round_up
from copg_jax.models.ops import MIXED
from copg_jax.models.params import Architecture
from copg_jax.sharding import Partitioner

_LANES = 128
_LARGEST_BLOCK = 512


def choose(wanted: str, arch: Architecture, mesh: jax.sharding.Mesh) -> Architecture:
    """The architecture with `attention` set to what computes prompts on the devices of a mesh.

    Args:
        wanted: one of `ATTENTION_CHOICES`; "auto" takes a fused kernel wherever one fits.
        arch: sizes and compute dtype.
        mesh: where it will run, or for which it is compiled.

    Raises:
        InputError: what is wanted cannot run there.
    """
    if wanted not in ATTENTION_CHOICES:
        raise InputError(f"attention must be one of {', '.join(ATTENTION_CHOICES)}, got {wanted!r}")
    missing = {name: kernel.missing(arch, mesh) for name, kernel in _KERNELS.items()}
    best = next((name for name, reason in missing.items() if reason is None), "xla")
    if reason := missing.get(wanted):
        raise InputError(
            f"attention={wanted}: wanted {reason}. Fix: attention=auto, which takes {best} here."
        )
    return dataclasses.replace(arch, attention=best if wanted == "auto" else wanted)


def fused_attention(
    name: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prompt_length: jax.Array,
    partitioner: Partitioner,
) -> jax.Array:
    """`attention.prompt_attention` by the kernel of that name.

    Args:
        name: key of `_KERNELS`.
        q: queries [B, P, H, Hd].
        k: keys [B, P, KV, Hd].
        v: values [B, P, KV, Hd].
        prompt_length: valid tokens [B], at least 1.
        partitioner: each device runs the kernel for its own groups and heads.

    Returns:
        [B, P, H, Hd]; rows of padding are finite and mean nothing.
    """
    own = ("batch", None, "heads", "head_dim")
    shared = ("batch", None, "kv_heads", "head_dim")
    run = partitioner.on_shards(
        _KERNELS[name].function, in_axes=(own, shared, shared, ("batch",)), out_axes=own
    )
    return run(q, k, v, prompt_length)


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, prompt_length: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Splash attention, JAX's flash kernel for TPUs; `interpret` computes it anywhere, slowly."""
    # Half a second to import, which only those who use it should spend.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    del prompt_length  # causality alone hides padding
    size = q.shape[1]
    num_blocks = -(-size // _LARGEST_BLOCK)
    block = round_up(-(-size // num_blocks), _LANES)
    padded = num_blocks * block
    # One kernel for all three gradients computes the scores once less, but it sums in memory what
    # each block of keys adds to the gradient of q.
    fused = num_blocks == 1
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((padded, padded))] * q.shape[2]),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=MIXED,
        interpret=interpret,
    )
    q = q * q.shape[-1] ** -0.5
    heads_first = (_pad(x, padded).swapaxes(1, 2) for x in (q, k, v))
    mixed: Any = jax.vmap(kernel)(*heads_first)
    return mixed.swapaxes(1, 2)[:, :size]


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, prompt_length: jax.Array) -> jax.Array:
    """cuDNN's flash attention, which skips padding."""
    size = q.shape[1]
    # Whole tiles of keys and explicit lengths: without them cuDNN's backward pass gives NaN on
    # Hopper where all scores of a row are very negative (NVIDIA/cudnn-frontend 160, 628, 1072).
    padded = round_up(size, _LANES)
    valid = (jnp.arange(padded)[None, :] < prompt_length[:, None])[..., None, None]

    def clean(x: jax.Array) -> jax.Array:
        # Nobody says what cuDNN leaves in rows of padding: it must not reach a gradient either.
        return jnp.where(valid, _pad(x, padded), 0)

    mixed = jax.nn.dot_product_attention(
        clean(q),
        clean(k),
        clean(v),
        is_causal=True,
        query_seq_lengths=prompt_length,
        key_value_seq_lengths=prompt_length,
        implementation="cudnn",
    )
    return jnp.where(valid, mixed, 0)[:, :size]


def _missing_splash(arch: Architecture, mesh: jax.sharding.Mesh) -> str | None:
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return f"a TPU, got {device.device_kind}"
    return _missing_bfloat16(arch)


def _missing_cudnn(arch: Architecture, mesh: jax.sharding.Mesh) -> str | None:
    device = mesh.devices.flat[0]
    generation = str(getattr(device, "compute_capability", ""))  # of NVIDIA a number such as 9.0
    if device.platform != "gpu" or not generation[:1].isdigit() or float(generation) < 8:
        return f"an NVIDIA GPU of compute capability 8.0 or more, got {device.device_kind}"
    if arch.head_dim % 8 or arch.head_dim > 128:
        return f"a head_dim of at most 128, a multiple of 8, got {arch.head_dim}"
    return _missing_bfloat16(arch)


def _missing_bfloat16(arch: Architecture) -> str | None:
    """Who computes in float32 wants it exact, and kernels multiply in bfloat16."""
    return None if arch.dtype == "bfloat16" else f"dtype bfloat16, got {arch.dtype}"


class _Kernel(NamedTuple):
    function: Callable[..., jax.Array]  # (q, k, v, prompt_length) → mixed values, on one device
    missing: Callable[..., Any]  # (arch, mesh) → what it lacks there, or None


_KERNELS = {"splash": _Kernel(_splash, _missing_splash), "cudnn": _Kernel(_cudnn, _missing_cudnn)}


def _pad(x: jax.Array, size: int) -> jax.Array:
    """[B, P, ...] → [B, size, ...]."""
    return jnp.pad(x, [(0, 0), (0, size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])

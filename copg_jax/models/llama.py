"""The Llama decoder: configuration, the table that describes every parameter, and one layer.

1. `LlamaConfig` holds the sizes, with Hugging Face names.
2. `param_specs` gives shape, logical axes and initialiser of each parameter: the only such table.
3. `rotary_angles` and `rotate` apply rotary positions (Hugging Face convention: halves, not pairs).
4. `LlamaLayer` is one decoder layer; who sees whom is decided by the attention it is given.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers

from copg_jax.errors import InputError
from copg_jax.models.primitives import linear, rms_norm

HEADS = ("lm", "score")
DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("xla", "splash", "cudnn")  # who computes prompts, see `flash.choose`
# Names, for `jax.checkpoint`, of values that are costly to compute again.
MIXED = "mixed"  # results of attention, and what is needed beside them to differentiate it
PROJECTED = "projected"  # q, k, v and the sum that the MLP reads


def _mixed_saveable(primitive: Any, *_: Any, **params: Any) -> bool:
    """What cuDNN returns cannot be named by us, so the kernel itself is known by its name."""
    kernel = "dot_product_attention_fwd_wrapper"
    return primitive.name == kernel or _only_mixed(primitive, **params)


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saving all results must not mean to save the weights of every layer as they were gathered;
    `LlamaLayer` reshapes them after that, and saving the result would keep them too.
    """
    return primitive.name not in ("sharding_constraint", "reshape")


_only_mixed = jax.checkpoint_policies.save_only_these_names(MIXED)
_both = jax.checkpoint_policies.save_from_both_policies
# What the backward pass finds stored, instead of computing it again, per layer.
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "none": _all_but_gathered,
    "dots": _both(jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _mixed_saveable),
    "mlp": _both(jax.checkpoint_policies.save_only_these_names(PROJECTED), _mixed_saveable),
    "full": jax.checkpoint_policies.nothing_saveable,
}

Params = dict[str, Any]
Rotation = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's rescaling of slow rotary frequencies ("llama3" in Hugging Face configs)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama (Hugging Face names), then compute dtype, attention, rematerialisation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    dtype: str = "float32"
    attention: str = "xla"
    remat: str = "full"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and not value > 0:
                raise InputError(f"{field.name} must be positive, got {value}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.num_hidden_layers < 2:
            raise InputError(f"num_hidden_layers must be at least 2, got {self.num_hidden_layers}")
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        choices = {"dtype": DTYPES, "attention": ATTENTIONS, "remat": tuple(REMAT_POLICIES)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")


class ParamSpec(NamedTuple):
    """Shape, logical axis names (one a dimension; None = never sharded) and initialiser."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable[..., jax.Array]


def layer_specs(config: LlamaConfig) -> dict[str, ParamSpec]:
    """Parameters of one layer, without the leading `layers` axis."""
    sizes = {
        "embed": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
    }
    axes = {
        "input_layernorm": ("embed",),
        "q_proj": ("embed", "heads", "head_dim"),
        "k_proj": ("embed", "kv_heads", "head_dim"),
        "v_proj": ("embed", "kv_heads", "head_dim"),
        "o_proj": ("heads", "head_dim", "embed"),
        "post_attention_layernorm": ("embed",),
        "gate_proj": ("embed", "mlp"),
        "up_proj": ("embed", "mlp"),
        "down_proj": ("mlp", "embed"),
    }
    return {
        name: ParamSpec(
            tuple(sizes[axis] for axis in dims),
            dims,
            initializers.ones if len(dims) == 1 else initializers.normal(0.02),
        )
        for name, dims in axes.items()
    }


def layer_stacks(config: LlamaConfig) -> dict[str, int]:
    """The stacks that hold the layers, in order, with their sizes.

    The last layer stands alone since it computes less than the others: what no loss reads is left
    out. (A slice of one common stack would copy all its weights and gradients at every step.)
    """
    return {"layers": config.num_hidden_layers - 1, "last_layer": 1}


def param_specs(config: LlamaConfig, *, head: str = "lm") -> dict[str, Any]:
    """Describe the parameter tree: each leaf a ParamSpec, layers stacked as `layer_stacks` says.

    Args:
        config: sizes of the model.
        head: "lm" (adds `lm_head` unless tied) or "score" (adds `score`, std 1/sqrt(D+1)).
    """
    if head not in HEADS:
        raise InputError(f"head must be one of {HEADS}, got {head!r}")
    vocab, embed = config.vocab_size, config.hidden_size
    normal = initializers.normal(0.02)
    specs: dict[str, Any] = {
        "embed_tokens": ParamSpec((vocab, embed), ("vocab", "embed"), normal),
        **{
            stack: {
                name: ParamSpec((size, *spec.shape), ("layers", *spec.axes), spec.init)
                for name, spec in layer_specs(config).items()
            }
            for stack, size in layer_stacks(config).items()
        },
        "norm": ParamSpec((embed,), ("embed",), initializers.ones),
    }
    if head == "score":
        specs["score"] = ParamSpec((embed,), ("embed",), initializers.normal((embed + 1) ** -0.5))
    elif not config.tie_word_embeddings:
        specs["lm_head"] = ParamSpec((embed, vocab), ("embed", "vocab"), normal)
    return specs


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Rotary frequencies theta^(-2i/head_dim), slow ones rescaled for Llama 3.1: [head_dim / 2]."""
    exponent = np.arange(0, config.head_dim, 2) / config.head_dim
    frequency = config.rope_theta**-exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    # 1 = fast, kept; 0 = slow, divided by `factor`; linear in the number of turns in between.
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def rotary_angles(config: LlamaConfig, positions: jax.Array) -> Rotation:
    """Cosine and sine of position * frequency, float32.

    Args:
        config: gives head_dim, rope_theta and rope_scaling.
        positions: int [B, T], 0 = first token of the prompt.

    Returns:
        Two arrays [B, T, 1, head_dim / 2]; the unit axis stands for heads.
    """
    frequency = jnp.asarray(inverse_frequencies(config), jnp.float32)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotate the pairs (x_i, x_{i + Hd/2}) by the given angles: [B, T, heads, Hd] in and out."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class LlamaLayer(nnx.Module):
    """One decoder layer; its matrices are in the compute dtype, its norm scales in float32."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        def param(name: str) -> nnx.Param[jax.Array]:
            return nnx.Param(specs[name].init(rngs.params(), specs[name].shape, jnp.float32))

        specs = layer_specs(config)
        self.eps = config.rms_norm_eps
        self.input_layernorm = param("input_layernorm")
        self.q_proj = param("q_proj")
        self.k_proj = param("k_proj")
        self.v_proj = param("v_proj")
        self.o_proj = param("o_proj")
        self.post_attention_layernorm = param("post_attention_layernorm")
        self.gate_proj = param("gate_proj")
        self.up_proj = param("up_proj")
        self.down_proj = param("down_proj")

    def __call__(
        self,
        x: jax.Array,
        rotation: Rotation,
        attend: Callable[..., tuple[jax.Array, Any]],
        read: Callable[[jax.Array], jax.Array] = lambda tokens: tokens,
    ) -> tuple[jax.Array, Any]:
        """Attention and MLP, each x + f(norm(x)).

        Args:
            x: [B, T, D], compute dtype.
            rotation: from `rotary_angles`, for the positions of the T tokens.
            attend: (q [B, U, H, Hd], k, v [B, T, KV, Hd]) -> (mixed v [B, U, H, Hd], extra).
            read: [B, T, ...] -> [B, U, ...], the tokens whose output is wanted. Of the others only
                keys and values are computed.

        Returns:
            The new x [B, U, D] and `extra` (cache columns, or None) as `attend` gave it.
        """
        keep = partial(checkpoint_name, name=PROJECTED)
        normed = rms_norm(x, self.input_layernorm[...], self.eps)
        k = keep(rotate(_project(normed, self.k_proj), rotation))
        v = keep(_project(normed, self.v_proj))
        x, rotation = jax.tree.map(read, (x, rotation))
        normed = rms_norm(x, self.input_layernorm[...], self.eps)
        q = keep(rotate(_project(normed, self.q_proj), rotation))
        mixed, extra = attend(q, k, v)
        # One merged contraction axis: over (h, e) XLA transposes the weights at every decode step.
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        o_proj = self.o_proj[...].reshape(mixed.shape[-1], -1)
        x = keep(x + linear(mixed, o_proj))

        normed = rms_norm(x, self.post_attention_layernorm[...], self.eps)
        gate = _project(normed, self.gate_proj)
        up = _project(normed, self.up_proj)
        return x + _project(jax.nn.silu(gate) * up, self.down_proj), extra


def _project(x: jax.Array, weight: nnx.Param[jax.Array]) -> jax.Array:
    """[B, T, D], [D, ...] → [B, T, ...]."""
    matrix = weight[...]
    return linear(x, matrix.reshape(len(matrix), -1)).reshape(*x.shape[:-1], *matrix.shape[1:])

"""The parameters of the decoder: its architecture and the one table that describes each of them.

1. `Architecture` holds the sizes, what is particular to a family, and how to compute with them.
2. `LAYER_PARAMS` is the one table of a layer's parameters: Hugging Face name, logical axes,
   initialiser, and the field of `Architecture` that asks for it; `param_specs` adds the others.
3. `initial`, `abstract` and `axes_of` read any tree of specs; `init_params`, `abstract_params`,
   `logical_axes` and `cast_matrices` those of a whole model.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers

from copg_jax.config.sections import ATTENTIONS, DTYPES, REMATS
from copg_jax.errors import InputError
from copg_jax.sharding import Axes

HEADS = ("lm", "score")

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's rescaling of slow rotary frequencies ("llama3" in Hugging Face configs)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | float) or not value > 0:
                raise InputError(f"rope_scaling: {name} must be a positive number, got {value!r}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"rope_scaling: high_freq_factor ({self.high_freq_factor}) must be above "
                f"low_freq_factor ({self.low_freq_factor})"
            )


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes (Hugging Face names), what families differ in, and how to compute."""

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
    model_type: str = "llama"  # of files, see `hf.families`: no computation reads it
    qkv_bias: bool = False
    qk_norm: bool = False  # a norm of each head's queries and keys
    rotary_layers: tuple[bool, ...] | None = None  # which layers have rotary positions; None = all
    sliding_window: int | None = None  # tokens that one sees at most; no sequence may be longer
    dtype: str = "float32"
    attention: str = "xla"  # what computes prompts, see `kernels.choose`
    remat: str = "full"  # what the backward pass recomputes, see `decoder.REMAT_POLICIES`

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
        if self.rotary_layers is not None and len(self.rotary_layers) != self.num_hidden_layers:
            raise InputError(
                f"rotary_layers: wanted one value for each of {self.num_hidden_layers} layers, "
                f"got {len(self.rotary_layers)}"
            )
        window = self.sliding_window
        if window is not None and not (isinstance(window, int) and window > 0):
            raise InputError(f"sliding_window must be a positive integer or null, got {window!r}")
        choices = {"dtype": DTYPES, "attention": ATTENTIONS, "remat": REMATS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")

    @property
    def most_tokens(self) -> tuple[int, str]:
        """How long a sequence may be, and the field that says so.

        Attention here sees all that came before, which inside a window is what a window does.
        """
        limits = ("max_position_embeddings", "sliding_window")
        found = [(getattr(self, name), name) for name in limits]
        return min((most, name) for most, name in found if most is not None)


class ParamSpec(NamedTuple):
    """Shape, logical axis names (one a dimension; None = never sharded) and initialiser."""

    shape: tuple[int, ...]
    axes: Axes
    init: Callable[..., jax.Array]

    @property
    def num_inputs(self) -> int:
        """How many axes of a layer's matrix are contracted, the first ones; two of o_proj."""
        return 2 if self.axes[0] == "heads" else 1


class LayerParam(NamedTuple):
    """A parameter of every layer, or of the layers of some architectures."""

    hf_name: str  # after "model.layers.<number>."
    axes: tuple[str, ...]  # logical
    init: Callable[..., jax.Array]
    asked_by: str | None = None  # field of `Architecture`; None = every layer has it


_NORMAL, _ONES, _ZEROS = initializers.normal(0.02), initializers.ones, initializers.zeros
_QUERY, _KEY = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
LAYER_PARAMS: dict[str, LayerParam] = {
    "input_layernorm": LayerParam("input_layernorm.weight", ("embed",), _ONES),
    "q_proj": LayerParam("self_attn.q_proj.weight", _QUERY, _NORMAL),
    "q_bias": LayerParam("self_attn.q_proj.bias", ("q_width",), _ZEROS, "qkv_bias"),
    "k_proj": LayerParam("self_attn.k_proj.weight", _KEY, _NORMAL),
    "k_bias": LayerParam("self_attn.k_proj.bias", ("kv_width",), _ZEROS, "qkv_bias"),
    "v_proj": LayerParam("self_attn.v_proj.weight", _KEY, _NORMAL),
    "v_bias": LayerParam("self_attn.v_proj.bias", ("kv_width",), _ZEROS, "qkv_bias"),
    "q_norm": LayerParam("self_attn.q_norm.weight", ("head_dim",), _ONES, "qk_norm"),
    "k_norm": LayerParam("self_attn.k_norm.weight", ("head_dim",), _ONES, "qk_norm"),
    "o_proj": LayerParam("self_attn.o_proj.weight", ("heads", "head_dim", "embed"), _NORMAL),
    "post_attention_layernorm": LayerParam("post_attention_layernorm.weight", ("embed",), _ONES),
    "gate_proj": LayerParam("mlp.gate_proj.weight", ("embed", "mlp"), _NORMAL),
    "up_proj": LayerParam("mlp.up_proj.weight", ("embed", "mlp"), _NORMAL),
    "down_proj": LayerParam("mlp.down_proj.weight", ("mlp", "embed"), _NORMAL),
}


def layer_specs(arch: Architecture) -> dict[str, ParamSpec]:
    """Parameters of one layer, without the leading `layers` axis."""
    sizes = {
        "embed": arch.hidden_size,
        "heads": arch.num_attention_heads,
        "kv_heads": arch.num_key_value_heads,
        "head_dim": arch.head_dim,
        "q_width": arch.num_attention_heads * arch.head_dim,
        "kv_width": arch.num_key_value_heads * arch.head_dim,
        "mlp": arch.intermediate_size,
    }
    return {
        name: ParamSpec(tuple(sizes[axis] for axis in param.axes), param.axes, param.init)
        for name, param in LAYER_PARAMS.items()
        if param.asked_by is None or getattr(arch, param.asked_by)
    }


def layer_stacks(arch: Architecture) -> dict[str, int]:
    """The stacks that hold the layers, in order, with their sizes.

    The last layer stands alone, since of it only the states that a loss reads are computed: 2 % of
    a step's operations at 32 layers, 17 % at 4. (A slice of one common stack would copy all its
    weights and gradients at every step.)
    """
    return {"layers": arch.num_hidden_layers - 1, "last_layer": 1}


def stacked(arch: Architecture, specs: dict[str, ParamSpec]) -> dict[str, dict[str, ParamSpec]]:
    """Parameters of one layer as the stacks of all layers."""
    return {
        stack: {
            name: ParamSpec((size, *spec.shape), ("layers", *spec.axes), spec.init)
            for name, spec in specs.items()
        }
        for stack, size in layer_stacks(arch).items()
    }


def param_specs(arch: Architecture, *, head: str = "lm") -> dict[str, Any]:
    """Describe the parameter tree: each leaf a ParamSpec, layers stacked as `layer_stacks` says.

    Args:
        arch: sizes of the model.
        head: "lm" (adds `lm_head` unless tied) or "score" (adds `score`, std 1/sqrt(D+1)).
    """
    if head not in HEADS:
        raise InputError(f"head must be one of {HEADS}, got {head!r}")
    vocab, embed = arch.vocab_size, arch.hidden_size
    specs: dict[str, Any] = {
        "embed_tokens": ParamSpec((vocab, embed), ("vocab", "embed"), _NORMAL),
        **stacked(arch, layer_specs(arch)),
        "norm": ParamSpec((embed,), ("embed",), _ONES),
    }
    if head == "score":
        specs["score"] = ParamSpec((embed,), ("embed",), initializers.normal((embed + 1) ** -0.5))
    elif not arch.tie_word_embeddings:
        specs["lm_head"] = ParamSpec((embed, vocab), ("embed", "vocab"), _NORMAL)
    return specs


def init_params(arch: Architecture, key: jax.Array, *, head: str = "lm") -> Params:
    """Draw float32 parameters: N(0, 0.02) matrices, unit norms, zero biases, score head of std
    1/sqrt(D+1).
    """
    return initial(param_specs(arch, head=head), key)


def abstract_params(arch: Architecture, *, head: str = "lm") -> Params:
    """The tree of `init_params` as ShapeDtypeStructs."""
    return abstract(param_specs(arch, head=head))


def logical_axes(arch: Architecture, *, head: str = "lm") -> Params:
    """The tree of `init_params` with a tuple of logical axis names at each leaf."""
    return axes_of(param_specs(arch, head=head))


def initial(specs: Params, key: jax.Array) -> Params:
    """Draws the float32 parameters of a tree of specs."""
    flat, tree = jax.tree.flatten(specs, is_leaf=_is_spec)
    keys = jax.random.split(key, len(flat))
    return jax.tree.unflatten(
        tree, [spec.init(k, spec.shape, jnp.float32) for spec, k in zip(flat, keys, strict=True)]
    )


def abstract(specs: Params) -> Params:
    """The tree of `initial` as ShapeDtypeStructs."""
    return _map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), specs)


def axes_of(specs: Params) -> Params:
    """The tree of `initial` with a tuple of logical axis names at each leaf."""
    return _map_specs(lambda spec: spec.axes, specs)


def cast_matrices(arch: Architecture, params: Params) -> Params:
    """Cast the matrices to the compute dtype, which the forward pass does where it gathers them.

    Vectors (norm scales, biases, score head) are used in float32 and stay, so that no result
    changes. Adapters, which are small, stay too.
    """
    head = "score" if "score" in params else "lm"
    axes, cast = logical_axes(arch, head=head), partial(cast_matrix, arch)
    is_axes = lambda node: isinstance(node, tuple)
    own = {name: part for name, part in params.items() if name in axes}
    return params | {
        name: jax.tree.map(cast, axes[name], part, is_leaf=is_axes) for name, part in own.items()
    }


def cast_matrix(arch: Architecture, axes: Axes, leaf: jax.Array) -> jax.Array:
    """One leaf of `cast_matrices`; `axes` are its logical axes, with or without `layers`."""
    return leaf.astype(frozen_dtype(arch, axes))


def frozen_dtype(arch: Architecture, axes: Axes) -> str:
    """The dtype in which a parameter that is only read can be kept: float32 for a vector."""
    return "float32" if len(axes) - ("layers" in axes) == 1 else arch.dtype


def _is_spec(node: Any) -> bool:
    return isinstance(node, ParamSpec)


def _map_specs(fn: Callable[[ParamSpec], Any], specs: Params) -> Params:
    return jax.tree.map(fn, specs, is_leaf=_is_spec)

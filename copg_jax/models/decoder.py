"""The decoder, of Llama and its relatives, as pure functions on nested dicts of arrays.

1. `rotary_angles` and `rotate` apply rotary positions (Hugging Face convention: halves, not pairs).
2. `DecoderLayer` is one layer; who sees whom is decided by the attention that it is given.
3. `Decoder` has the pieces of a forward pass. Which tokens there are is decided by its callers:
   `forward` for whole groups, `decoding` for one token at a time.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from copg_jax.config.sections import REMATS
from copg_jax.models.lora import Factors, adapted, factors, layer_lora_specs
from copg_jax.models.ops import MIXED, rms_norm
from copg_jax.models.params import Architecture, Params, cast_matrix, layer_specs
from copg_jax.sharding import ONE_DEVICE, Partitioner

PROJECTED = "projected"  # name, for `jax.checkpoint`, of q, k, v and the sum that the MLP reads


def _mixed_saveable(primitive: Any, *_: Any, **params: Any) -> bool:
    """What cuDNN returns cannot be named by us, so the kernel itself is known by its name."""
    kernel = "dot_product_attention_fwd_wrapper"
    return primitive.name == kernel or _only_mixed(primitive, **params)


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saving all results must not mean to save the weights of every layer as they were gathered;
    `DecoderLayer` reshapes them after that, and saving the result would keep them too.
    """
    return primitive.name not in ("sharding_constraint", "reshape")


_only_mixed = jax.checkpoint_policies.save_only_these_names(MIXED)
_both = jax.checkpoint_policies.save_from_both_policies
_POLICIES: tuple[Callable[..., Any], ...] = (
    _all_but_gathered,
    _both(jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _mixed_saveable),
    _both(jax.checkpoint_policies.save_only_these_names(PROJECTED), _mixed_saveable),
    jax.checkpoint_policies.nothing_saveable,
)
REMAT_POLICIES: dict[str, Callable[..., Any]] = dict(zip(REMATS, _POLICIES, strict=True))
"""What the backward pass of a layer finds stored, instead of computing it again."""

Rotation = tuple[jax.Array, jax.Array]
Attend = Callable[..., tuple[jax.Array, Any]]
"""(q, k, v, *slices) → (mixed values, extra); see `DecoderLayer`."""


def inverse_frequencies(arch: Architecture) -> np.ndarray:
    """Rotary frequencies theta^(-2i/head_dim), slow ones rescaled for Llama 3.1: [head_dim / 2]."""
    exponent = np.arange(0, arch.head_dim, 2) / arch.head_dim
    frequency = arch.rope_theta**-exponent
    scaling = arch.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    # 1 = fast, kept; 0 = slow, divided by `factor`; linear in the number of turns in between.
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def rotary_angles(arch: Architecture, positions: jax.Array) -> Rotation:
    """Cosine and sine of position * frequency, float32.

    Args:
        arch: gives head_dim, rope_theta and rope_scaling.
        positions: int [B, T], 0 = first token of the prompt.

    Returns:
        Two arrays [B, T, 1, head_dim / 2]; the unit axis stands for heads.
    """
    frequency = jnp.asarray(inverse_frequencies(arch), jnp.float32)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotate the pairs (x_i, x_{i + Hd/2}) by the given angles: [B, T, heads, Hd] in and out."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _turn_if(is_rotary: jax.Array, rotation: Rotation) -> Rotation:
    """The rotation, or one by no angle."""
    cos, sin = rotation
    return jnp.where(is_rotary, cos, 1.0), jnp.where(is_rotary, sin, 0.0)


class DecoderLayer(nnx.Module):
    """One decoder layer; its matrices are in the compute dtype, its norm scales and biases in
    float32.
    """

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        def param(name: str) -> nnx.Param[jax.Array]:
            return nnx.Param(specs[name].init(rngs.params(), specs[name].shape, jnp.float32))

        def optional(name: str) -> nnx.Param[jax.Array] | None:
            return param(name) if name in specs else None

        specs = layer_specs(arch)
        self.eps = arch.rms_norm_eps
        self.input_layernorm = param("input_layernorm")
        self.q_proj, self.q_bias = param("q_proj"), optional("q_bias")
        self.k_proj, self.k_bias = param("k_proj"), optional("k_bias")
        self.v_proj, self.v_bias = param("v_proj"), optional("v_bias")
        self.q_norm, self.k_norm = optional("q_norm"), optional("k_norm")
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
        lora: Mapping[str, Factors] = MappingProxyType({}),
    ) -> tuple[jax.Array, Any]:
        """Attention and MLP, each x + f(norm(x)).

        Args:
            x: [B, T, D], compute dtype.
            rotation: from `rotary_angles`, for the positions of the T tokens.
            attend: (q [B, U, H, Hd], k, v [B, T, KV, Hd]) -> (mixed v [B, U, H, Hd], extra).
            read: [B, T, ...] -> [B, U, ...], the tokens whose output is wanted. Of the others only
                keys and values are computed.
            lora: adapters, by the name of their matrix.

        Returns:
            The new x [B, U, D] and `extra` (cache columns, or None) as `attend` gave it.
        """
        normed = rms_norm(x, self.input_layernorm[...], self.eps)
        k = _project(normed, self.k_proj, self.k_bias, lora.get("k_proj"))
        k = self._place(k, self.k_norm, rotation)
        v = _keep(_project(normed, self.v_proj, self.v_bias, lora.get("v_proj")))
        x, rotation = jax.tree.map(read, (x, rotation))
        normed = rms_norm(x, self.input_layernorm[...], self.eps)
        q = _project(normed, self.q_proj, self.q_bias, lora.get("q_proj"))
        q = self._place(q, self.q_norm, rotation)
        mixed, extra = attend(q, k, v)
        # One merged contraction axis: over (h, e) XLA transposes the weights at every decode step.
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        o_proj = self.o_proj[...].reshape(mixed.shape[-1], -1)
        x = _keep(x + adapted(mixed, o_proj, lora.get("o_proj")))

        normed = rms_norm(x, self.post_attention_layernorm[...], self.eps)
        gate = _project(normed, self.gate_proj, lora=lora.get("gate_proj"))
        up = _project(normed, self.up_proj, lora=lora.get("up_proj"))
        active = jax.nn.silu(gate) * up
        return x + _project(active, self.down_proj, lora=lora.get("down_proj")), extra

    def _place(
        self, heads: jax.Array, norm: nnx.Param[jax.Array] | None, rotation: Rotation
    ) -> jax.Array:
        """Queries or keys, normed where there is a norm, at their positions: [B, T, heads, Hd]."""
        if norm is None:
            return _keep(rotate(heads, rotation))
        # What is stored is what the norm's gradient reads: the rest costs no product to redo.
        return rotate(rms_norm(_keep(heads), norm[...], self.eps), rotation)


_keep = partial(checkpoint_name, name=PROJECTED)


def _project(
    x: jax.Array,
    weight: nnx.Param[jax.Array],
    bias: nnx.Param[jax.Array] | None = None,
    lora: Factors | None = None,
) -> jax.Array:
    """[B, T, D], [D, ...] and the bias [size of ...] → [B, T, ...]."""
    matrix = weight[...]
    y = adapted(x, matrix.reshape(len(matrix), -1), lora)
    if bias is not None:
        y = (y + jnp.broadcast_to(bias[...], y.shape)).astype(y.dtype)
    return y.reshape(*x.shape[:-1], *matrix.shape[1:])


@dataclass(frozen=True)
class Decoder:
    """The pieces of a forward pass; the parameters are arguments, and may be traced."""

    arch: Architecture
    partitioner: Partitioner = ONE_DEVICE

    def with_weights_in_place(self) -> "Decoder":
        """The same, for steps of a single token; see `Partitioner`."""
        return replace(self, partitioner=replace(self.partitioner, weights_in_place=True))

    def output_matrix(self, params: Params) -> jax.Array:
        """The matrix [D, V] that turns hidden states into logits, compute dtype, gathered for use;
        the embedding's transpose if tied.
        """
        matrix = params["lm_head"] if "lm_head" in params else params["embed_tokens"].T
        return self.partitioner.gather_weight(matrix.astype(self.arch.dtype), ("embed", "vocab"))

    def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        """The first hidden states, compute dtype: ids [R, N] → [R, N, D]."""
        x = jnp.take(params["embed_tokens"], tokens, axis=0).astype(self.arch.dtype)
        return self.partitioner.constrain_residual(x)

    def scan_layers(
        self,
        params: Params,
        x: jax.Array,
        rotation: Rotation,
        attend: Attend,
        slices: tuple[Any, ...] = (),
    ) -> tuple[jax.Array, Any]:
        """Runs all layers but the last, each recomputed in the backward pass as `arch.remat` says.

        Args:
            params: tree of `init_params`, perhaps with adapters.
            x: [R, N, D].
            rotation: of the N tokens.
            attend: see `Attend`.
            slices: arrays with a leading axis of layers, handed to `attend` layer by layer.

        Returns:
            The new x, and the extras of all layers, stacked.
        """
        layer_step, stack = self._layer_step(params, rotation, attend), _stack(params, "layers")
        # Inside a scan the barrier against common-subexpression elimination is not needed.
        policy = REMAT_POLICIES[self.arch.remat]
        layer_step = jax.checkpoint(layer_step, policy=policy, prevent_cse=False)
        return jax.lax.scan(layer_step, x, (stack, self._rotary_flags(slice(None, -1)), slices))

    def last_layer(
        self,
        params: Params,
        x: jax.Array,
        rotation: Rotation,
        attend: Attend,
        slices: tuple[Any, ...] = (),
        *,
        read: Callable[[jax.Array], jax.Array] = lambda tokens: tokens,
    ) -> tuple[jax.Array, Any]:
        """Runs the last layer for the tokens that `read` picks; see `DecoderLayer`.

        Its backward pass comes first of all, so nothing is gained by recomputing it.
        """
        inputs = _stack(params, "last_layer"), self._rotary_flags(slice(-1, None)), slices
        inputs = jax.tree.map(lambda leaf: jnp.squeeze(leaf, axis=0), inputs)
        x, extra = self._layer_step(params, rotation, attend, read)(x, inputs)
        return x, jax.tree.map(lambda leaf: leaf[None], extra)

    def final_norm(self, params: Params, x: jax.Array) -> jax.Array:
        """The norm after the last layer."""
        return rms_norm(x, params["norm"], self.arch.rms_norm_eps)

    def _rotary_flags(self, layers: slice) -> jax.Array | None:
        """Which of these layers have rotary positions, bool [l]; None = all layers of the model."""
        flags = self.arch.rotary_layers
        return None if flags is None else jnp.asarray(flags[layers])

    def _layer_step(
        self,
        params: Params,
        rotation: Rotation,
        attend: Attend,
        read: Callable[[jax.Array], jax.Array] = lambda tokens: tokens,
    ) -> Callable[..., tuple[jax.Array, Any]]:
        """One layer as a function (x, (weights, rotary flag, slices)) → (x, extra)."""
        graph, own = _layer_graph(self.arch), layer_specs(self.arch)
        specs = own | layer_lora_specs(self.arch, rank=1)  # of which the axes are read
        gather, scale = self.partitioner.gather_weight, params.get("lora_scale")

        def layer_step(x, inputs):
            weights, is_rotary, slices = inputs
            weights = {
                name: gather(cast_matrix(self.arch, specs[name].axes, weight), specs[name].axes)
                for name, weight in weights.items()
            }
            layer = nnx.merge(graph, {name: weights[name] for name in own})
            turn = rotation if is_rotary is None else _turn_if(is_rotary, rotation)
            lora = factors(weights, scale)
            x, extra = layer(x, turn, lambda q, k, v: attend(q, k, v, *slices), read, lora)
            return self.partitioner.constrain_residual(x), extra

        return layer_step


def _stack(params: Params, name: str) -> Params:
    """The weights of a stack of layers, and their adapters."""
    return params[name] | params.get("lora", {}).get(name, {})


@functools.cache
def _layer_graph(arch: Architecture) -> nnx.GraphDef[DecoderLayer]:
    """The weightless structure of a layer, made without computing anything."""
    return nnx.split(nnx.eval_shape(lambda: DecoderLayer(arch, nnx.Rngs(0))))[0]

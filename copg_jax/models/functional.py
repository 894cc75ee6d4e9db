"""The model as pure functions on nested dicts of arrays; nothing else splits or merges modules.

1. `init`, `abstract_params`, `logical_axes` read the parameter table.
2. `apply` runs a group: the prompt once, its K completions beside it, in one sequence
   [prompt | completion_1 | ... | completion_K] for all linear layers.
3. `prefill` and `decode_step` do the same computation one completion token at a time.

`config` is static everywhere; every array argument may be traced.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from copg_jax.models.attention import completion_attention, prompt_attention
from copg_jax.models.llama import (
    REMAT_POLICIES,
    LlamaConfig,
    LlamaLayer,
    Params,
    ParamSpec,
    Rotation,
    param_specs,
    rms_norm,
    rotary_angles,
)
from copg_jax.sharding import constrain_batch


class Hidden(NamedTuple):
    """Hidden states after the final norm, in the compute dtype: [B, D] and [B, K, C, D]."""

    last_prompt: jax.Array
    completion: jax.Array


class Cache(NamedTuple):
    """Keys and values of the prompts (written once) and of the completions (one column a step).

    Positions are the last axis: the order in which a step multiplies, so that it does not
    transpose the whole prompt for one query (3x faster on CPU).
    """

    prompt_k: jax.Array  # [L, B, KV, Hd, P]
    prompt_v: jax.Array
    prompt_length: jax.Array  # [B]
    own_k: jax.Array  # [L, B, K, KV, Hd, C]
    own_v: jax.Array


def init(config: LlamaConfig, key: jax.Array, *, head: str = "lm") -> Params:
    """Draw float32 parameters: N(0, 0.02) matrices, unit norms, score head of std 1/sqrt(D+1)."""
    specs, tree = jax.tree.flatten(param_specs(config, head=head), is_leaf=_is_spec)
    keys = jax.random.split(key, len(specs))
    return jax.tree.unflatten(
        tree, [spec.init(k, spec.shape, jnp.float32) for spec, k in zip(specs, keys, strict=True)]
    )


def abstract_params(config: LlamaConfig, *, head: str = "lm") -> Params:
    """The tree of `init` as ShapeDtypeStructs."""
    return _map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), config, head)


def logical_axes(config: LlamaConfig, *, head: str = "lm") -> Params:
    """The tree of `init` with a tuple of logical axis names at each leaf."""
    return _map_specs(lambda spec: spec.axes, config, head)


def cast_matrices(config: LlamaConfig, params: Params) -> Params:
    """Cast the matrices to the compute dtype, which the forward pass does wherever it uses them.

    Vectors (norm scales, score head) are used in float32 and stay, so that no result changes.
    """

    def cast(axes: tuple[str | None, ...], leaf: jax.Array) -> jax.Array:
        return leaf if len(axes) - ("layers" in axes) == 1 else leaf.astype(config.dtype)

    head = "score" if "score" in params else "lm"
    axes = logical_axes(config, head=head)
    return jax.tree.map(cast, axes, params, is_leaf=lambda node: isinstance(node, tuple))


def output_matrix(params: Params) -> jax.Array:
    """The matrix [D, V] that turns hidden states into logits; the embedding's transpose if tied."""
    return params["lm_head"] if "lm_head" in params else params["embed_tokens"].T


def apply(
    config: LlamaConfig,
    params: Params,
    prompt_tokens: jax.Array,
    prompt_length: jax.Array,
    completion_tokens: jax.Array,
) -> Hidden:
    """Hidden states of a group: each completion continues its prompt, which is computed once.

    Args:
        config: static.
        params: tree of `init`.
        prompt_tokens: ids [B, P], right-padded with any valid id.
        prompt_length: valid tokens [B], at least 1.
        completion_tokens: ids [B, K, C], right-padded with any valid id.

    Returns:
        `last_prompt` predicts the first token of every completion; `completion[..., t, :]`
        predicts token t + 1. States of padding are finite and mean nothing.
    """
    batch, prompt_size = prompt_tokens.shape
    _, num_completions, size = completion_tokens.shape
    tokens = jnp.concatenate([prompt_tokens, completion_tokens.reshape(batch, -1)], axis=1)
    positions = jnp.concatenate(
        [
            jnp.broadcast_to(jnp.arange(prompt_size)[None, :], (batch, prompt_size)),
            jnp.tile(prompt_length[:, None] + jnp.arange(size)[None, :], (1, num_completions)),
        ],
        axis=1,
    )

    def attend(q, k, v):
        def own(x):
            return x[:, prompt_size:].reshape(batch, num_completions, size, *x.shape[2:])

        prompt_k, prompt_v = k[:, :prompt_size], v[:, :prompt_size]
        prompt = prompt_attention(q[:, :prompt_size], prompt_k, prompt_v, prompt_length)
        completion = completion_attention(
            own(q), prompt_k, prompt_v, prompt_length, own(k), own(v), 0
        )
        return jnp.concatenate([prompt, completion.reshape(batch, -1, *q.shape[2:])], axis=1), None

    x, _ = _run_layers(config, params, tokens, positions, attend)
    last_prompt = _final_norm(config, params, _last(x, prompt_length))
    completion = x[:, prompt_size:].reshape(batch, num_completions, size, -1)
    return Hidden(last_prompt, _final_norm(config, params, completion))


def prefill(
    config: LlamaConfig,
    params: Params,
    prompt_tokens: jax.Array,
    prompt_length: jax.Array,
    *,
    num_samples: int,
    max_new_tokens: int,
) -> tuple[Cache, jax.Array]:
    """Run the prompts once and make room for `num_samples` completions of each.

    Args:
        config: static.
        params: tree of `init`.
        prompt_tokens: ids [B, P], right-padded with any valid id.
        prompt_length: valid tokens [B], at least 1.
        num_samples: K, completions of each prompt.
        max_new_tokens: C, columns of the own cache.

    Returns:
        The cache and the hidden state of the last prompt token [B, D], as in `apply`.
    """
    batch, prompt_size = prompt_tokens.shape
    positions = jnp.broadcast_to(jnp.arange(prompt_size)[None, :], (batch, prompt_size))

    def attend(q, k, v):
        return prompt_attention(q, k, v, prompt_length), (_to_cache(k), _to_cache(v))

    x, (prompt_k, prompt_v) = _run_layers(config, params, prompt_tokens, positions, attend)
    own_shape = (
        config.num_hidden_layers,
        batch,
        num_samples,
        config.num_key_value_heads,
        config.head_dim,
        max_new_tokens,
    )
    own_k, own_v = jnp.zeros(own_shape, prompt_k.dtype), jnp.zeros(own_shape, prompt_v.dtype)
    cache = Cache(prompt_k, prompt_v, prompt_length, own_k, own_v)
    return cache, _final_norm(config, params, _last(x, prompt_length))


def decode_step(
    config: LlamaConfig,
    params: Params,
    cache: Cache,
    tokens: jax.Array,
    index: jax.Array | int,
) -> tuple[jax.Array, Cache]:
    """Append one token to every completion; the same attention as in `apply`, one query a row.

    Args:
        config: static.
        params: tree of `init`.
        cache: from `prefill` or the previous step; columns before `index` are filled.
        tokens: ids [B, K], the tokens at position `index` of the completions.
        index: column to write, 0 to C - 1.

    Returns:
        Hidden states [B, K, D], which predict token index + 1, and the cache with column `index`
        written (in place where the cache is donated or carried by a loop).
    """
    positions = jnp.broadcast_to((cache.prompt_length + index)[:, None], tokens.shape)

    def attend(q, k, v, prompt_k, prompt_v, own_k, own_v):
        column = k[..., None], v[..., None]
        own = (
            jax.lax.dynamic_update_slice_in_dim(past, new, index, axis=-1)
            for past, new in zip((own_k, own_v), column, strict=True)
        )
        prompt_k, prompt_v, own_k, own_v = map(_from_cache, (prompt_k, prompt_v, *own))
        mixed = completion_attention(
            q[:, :, None], prompt_k, prompt_v, cache.prompt_length, own_k, own_v, index
        )
        return mixed[:, :, 0], column

    slices = (cache.prompt_k, cache.prompt_v, cache.own_k, cache.own_v)
    x, (new_k, new_v) = _run_layers(config, params, tokens, positions, attend, slices)
    # Layers return their new column only, so that one small write updates the whole cache.
    own_k = jax.lax.dynamic_update_slice_in_dim(cache.own_k, new_k, index, axis=-1)
    own_v = jax.lax.dynamic_update_slice_in_dim(cache.own_v, new_v, index, axis=-1)
    return _final_norm(config, params, x), cache._replace(own_k=own_k, own_v=own_v)


def _run_layers(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Callable[..., tuple[jax.Array, Any]],
    slices: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, Any]:
    """Embed [B, T] tokens and scan the layers; layer l gets slices[l], its extras are stacked."""
    graph = _layer_graph(config)
    rotation: Rotation = rotary_angles(config, positions)

    def layer_step(x, inputs):
        weights, layer_slices = inputs
        layer = nnx.merge(graph, weights)
        x, extra = layer(x, rotation, lambda q, k, v: attend(q, k, v, *layer_slices))
        return constrain_batch(x), extra

    # Inside a scan the barrier against common-subexpression elimination is not needed.
    layer_step = jax.checkpoint(layer_step, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
    x = constrain_batch(jnp.take(params["embed_tokens"], tokens, axis=0).astype(config.dtype))
    return jax.lax.scan(layer_step, x, (params["layers"], slices))


@functools.cache
def _layer_graph(config: LlamaConfig) -> nnx.GraphDef[LlamaLayer]:
    """The weightless structure of a layer, made without computing anything."""
    return nnx.split(nnx.eval_shape(lambda: LlamaLayer(config, nnx.Rngs(0))))[0]


def _final_norm(config: LlamaConfig, params: Params, x: jax.Array) -> jax.Array:
    return rms_norm(x, params["norm"], config.rms_norm_eps)


def _last(x: jax.Array, length: jax.Array) -> jax.Array:
    """x[b, length[b] - 1] for each row: [B, T, D] -> [B, D]."""
    return jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)[:, 0]


def _to_cache(x: jax.Array) -> jax.Array:
    """[..., T, KV, Hd] -> [..., KV, Hd, T]."""
    return jnp.moveaxis(x, -3, -1)


def _from_cache(x: jax.Array) -> jax.Array:
    """[..., KV, Hd, T] -> [..., T, KV, Hd]."""
    return jnp.moveaxis(x, -1, -3)


def _is_spec(node: Any) -> bool:
    return isinstance(node, ParamSpec)


def _map_specs(fn: Callable[[ParamSpec], Any], config: LlamaConfig, head: str) -> Params:
    return jax.tree.map(fn, param_specs(config, head=head), is_leaf=_is_spec)

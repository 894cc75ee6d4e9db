"""Who sees whom: the one definition of attention inside a group.

1. `prompt_attention`: a prompt token sees its prompt up to itself. XLA or a fused kernel computes
   it.
2. `completion_attention`: a query sees its whole prompt and the first tokens of its own
   completion, never another completion; one softmax over both parts.
3. `_attend` computes both where no kernel does: one softmax over several sets of keys. Its backward
   pass needs no weights, but computes them again from the scores and their normaliser (8 % of a
   step of the benchmark on a CPU, and 2 % of its memory).

Query heads are kept as [KV, H / KV], so grouped key-value heads are never repeated in memory;
scores and softmax are float32.
"""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from copg_jax.models.kernels import fused_attention
from copg_jax.models.ops import MIXED
from copg_jax.sharding import ONE_DEVICE, Partitioner

# Finite, so that a row without any visible key would still give a number and not NaN.
_MASKED = float(jnp.finfo(jnp.float32).min)
# Queries are cut into blocks of 64, the fastest on a CPU among 32, 64, 96, 128 and 256; into larger
# ones in longer prompts, as each takes its time to compile.
_QUERY_BLOCK = 64
_MOST_BLOCKS = 8
# An estimate for a TPU v5e and heads of 128: with fewer slots, starting a small product for every
# group and head takes a fused kernel longer than reading and writing all scores takes XLA.
_SHORTEST_FUSED = 256


def prompt_attention(
    q: Array,
    k: Array,
    v: Array,
    prompt_length: Array,
    *,
    backend: str = "xla",
    partitioner: Partitioner = ONE_DEVICE,
) -> Array:
    """Causal attention within right-padded prompts: softmax(q k / sqrt(Hd)) v.

    Args:
        q: queries [B, P, H, Hd].
        k: keys [B, P, KV, Hd].
        v: values [B, P, KV, Hd].
        prompt_length: valid tokens [B], at least 1.
        backend: one of `ATTENTIONS`; XLA computes short prompts in any case.
        partitioner: how a fused kernel is spread over devices.

    Returns:
        [B, P, H, Hd]; rows of padding are finite and mean nothing.
    """
    if backend != "xla" and q.shape[1] >= _SHORTEST_FUSED:
        return fused_attention(backend, q, k, v, prompt_length, partitioner)
    # Padding is on the right, so no valid query comes after it: causality alone hides it.
    queries, keys, values = _by_head(q, k.shape[2]), _by_head(k), _by_head(v)
    size, num_groups = q.shape[1], queries.shape[2]
    block = _QUERY_BLOCK * -(-size // (_QUERY_BLOCK * _MOST_BLOCKS))
    blocks = []
    for start in range(0, size, block):
        stop = min(start + block, size)
        upto = jnp.tile(jnp.tri(stop - start, dtype=bool), (num_groups, 1))[None, None]
        # What comes before the block is seen whole; what comes after it is never computed.
        before = _Part(keys[:, :, :start], values[:, :, :start], None)
        own = _Part(keys[:, :, start:stop], values[:, :, start:stop], upto)
        parts = (before, own) if start else (own,)
        blocks.append(_attend(queries[:, :, :, start:stop], parts))
    mixed = jnp.concatenate(blocks, axis=3)
    return mixed.reshape(len(q), -1, size, q.shape[3]).swapaxes(1, 2)


def completion_attention(
    q: Array,
    prompt_k: Array,
    prompt_v: Array,
    prompt_length: Array,
    own_k: Array,
    own_v: Array,
    num_seen: Array,
) -> Array:
    """One softmax over [whole prompt | own past], for every completion of a group at once.

    Args:
        q: queries [B, K, Q, H, Hd].
        prompt_k: keys of the prompt, shared by its K completions [B, P, KV, Hd].
        prompt_v: values of the prompt [B, P, KV, Hd].
        prompt_length: valid prompt tokens [B], at least 1.
        own_k: keys of the completions [B, K, C, KV, Hd].
        own_v: values of the completions [B, K, C, KV, Hd].
        num_seen: tokens of its own completion that a query sees, 0 to C; broadcasts to [B, K, Q].
            A completion token at position t sees t + 1; the last prompt token, which predicts the
            first token of each completion, sees 0.

    Returns:
        [B, K, Q, H, Hd]; rows of padding are finite and mean nothing.
    """
    num_heads, prompt_size, own_size = prompt_k.shape[2], prompt_k.shape[1], own_k.shape[2]
    # Heads before rows; all completions of a group are rows of one product with its prompt.
    split = q.reshape(*q.shape[:3], num_heads, -1, q.shape[-1])
    queries = split.transpose(0, 3, 1, 4, 2, 5)  # [B, KV, K, G, Q, Hd]
    own_k, own_v = (jnp.moveaxis(x, 3, 1) for x in (own_k, own_v))  # [B, KV, K, C, Hd]
    in_prompt = jnp.arange(prompt_size)[None, :] < prompt_length[:, None]
    num_seen = jnp.broadcast_to(num_seen, (*num_seen.shape[:2], q.shape[2]))
    in_past = jnp.arange(own_size)[None, None, None, :] < num_seen[..., None]
    in_past = jnp.tile(in_past, (1, 1, queries.shape[3], 1))  # [B, K, G Q, C]
    parts = (
        _Part(_by_head(prompt_k), _by_head(prompt_v), in_prompt[:, None, None]),
        _Part(own_k, own_v, in_past[:, None]),
    )
    return _attend(queries, parts).transpose(0, 2, 4, 1, 3, 5).reshape(q.shape)


class _Part(NamedTuple):
    """Keys and values for queries [..., Hd]; all queries of `...` that share them are N rows."""

    k: Array  # [..., T, Hd]
    v: Array  # [..., T, Hd]
    visible: Array | None  # bool, broadcasts to [..., N, T]; None = every row sees all

    def rows(self, per_query: Array) -> Array:
        """[each query ..., X] → [..., N, X]."""
        return per_query.reshape(*self.k.shape[:-2], -1, per_query.shape[-1])

    def scores(self, q: Array) -> Array:
        """Masked scores, float32: rows of queries that are scaled already → [..., N, T]."""
        scores = _matmul(self.rows(q), self.k.mT)
        return scores if self.visible is None else jnp.where(self.visible, scores, _MASKED)


@jax.custom_vjp
def _attend(q: Array, parts: tuple[_Part, ...]) -> Array:
    """softmax(q k / sqrt(Hd)) v, one softmax over the keys of all parts.

    Args:
        q: queries [..., Hd].
        parts: keys and values, each with leading axes that `...` begins with.

    Returns:
        Like q.
    """
    return _attend_forward(q, parts)[0]


def _attend_forward(q: Array, parts: tuple[_Part, ...]):
    scaled = q * q.shape[-1] ** -0.5
    scores = [part.scores(scaled) for part in parts]
    per_query = (*q.shape[:-1], 1)
    largest = reduce(jnp.maximum, (s.max(-1, initial=_MASKED).reshape(per_query) for s in scores))
    total, mixed = jnp.zeros(per_query, jnp.float32), jnp.zeros(q.shape, jnp.float32)
    for part, s in zip(parts, scores, strict=True):
        weights = jnp.exp(s - part.rows(largest))
        total += weights.sum(-1).reshape(per_query)
        mixed += _matmul(weights.astype(q.dtype), part.v).reshape(q.shape)
    # Named, so that what is stored under that name is not computed again for the backward pass.
    mixed = checkpoint_name((mixed / total).astype(q.dtype), MIXED)
    log_total = checkpoint_name((largest + jnp.log(total))[..., 0], MIXED)
    return mixed, (q, parts, mixed, log_total)


def _attend_backward(stored, dmixed: Array):
    q, parts, mixed, log_total = stored
    scale = q.shape[-1] ** -0.5
    log_total = log_total[..., None]
    # Of a softmax, dscore = weight (dweight − Σ weight dweight), and that sum is mixed · dmixed.
    along = jnp.sum(mixed.astype(jnp.float32) * dmixed, axis=-1, keepdims=True)
    dq, dparts = jnp.zeros(q.shape, jnp.float32), []
    for part in parts:
        rows, drows = part.rows(q * scale), part.rows(dmixed)
        weights = jnp.exp(part.scores(q * scale) - part.rows(log_total))
        dscores = weights * (_matmul(drows, part.v.mT) - part.rows(along))
        weights, dscores = weights.astype(q.dtype), dscores.astype(q.dtype)
        dq += scale * _matmul(dscores, part.k).reshape(q.shape)
        dk, dv = _matmul(dscores.mT, rows), _matmul(weights.mT, drows)
        dparts.append(_Part(dk.astype(q.dtype), dv.astype(q.dtype), None))
    return dq.astype(q.dtype), tuple(dparts)


_attend.defvjp(_attend_forward, _attend_backward)


def _matmul(a: Array, b: Array) -> Array:
    """[..., N, I], [..., I, M] → float32 [..., N, M]."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _by_head(x: Array, num_groups: int | None = None) -> Array:
    """[B, T, H, Hd] → [B, H, T, Hd]; with groups → [B, KV, H / KV, T, Hd].

    Consecutive query heads share a key-value head.
    """
    x = x.swapaxes(1, 2)
    if num_groups is None:
        return x
    return x.reshape(len(x), num_groups, -1, *x.shape[2:])

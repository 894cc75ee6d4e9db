"""Who sees whom; a wrong mask changes the result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.models import attention
from copg_jax.models.attention import completion_attention, prompt_attention

B, K, P, C, H, KV, HD = 2, 2, 5, 4, 4, 2, 6
LENGTH = jnp.array([3, 5])
SEEN = 1 + jnp.arange(C)[None, None, :]


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _completion_inputs():
    q = _normal(0, B, K, C, H, HD)
    prompt = _normal(1, B, P, KV, HD), _normal(2, B, P, KV, HD)
    own = _normal(3, B, K, C, KV, HD), _normal(4, B, K, C, KV, HD)
    return q, prompt, own


def _dense(q, prompt, own, sees):
    """Softmax over every key that `sees(b, n, t, source, position)` allows; source -1 = prompt."""
    out = np.zeros((B, K, C, H, HD))
    for b, n, t, h in np.ndindex(B, K, C, H):
        keys, values, g = [], [], h // (H // KV)
        for source in range(-1, K):
            k, v = (x[b] if source < 0 else y[b, source] for x, y in zip(prompt, own, strict=True))
            for position in range(len(k)):
                if sees(b, n, t, source, position):
                    keys.append(k[position, g])
                    values.append(v[position, g])
        scores = np.array(keys) @ np.asarray(q[b, n, t, h]) / HD**0.5
        weights = np.exp(scores - scores.max())
        out[b, n, t, h] = weights / weights.sum() @ np.array(values)
    return out


def _right(b, n, t, source, position):
    return position < LENGTH[b] if source < 0 else source == n and position <= t


def test_completion_attention_is_one_softmax_over_prompt_and_own_past():
    q, prompt, own = _completion_inputs()
    actual = completion_attention(q, *prompt, LENGTH, *own, SEEN)
    np.testing.assert_allclose(actual, _dense(q, prompt, own, _right), atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda b, n, t, s, p: p < LENGTH[b] if s < 0 else s <= n and (s < n or p <= t),
        lambda b, n, t, s, p: p < LENGTH[b] if s < 0 else s == n and (p < t or t == 0 == p),
        lambda b, n, t, s, p: True if s < 0 else s == n and p <= t,
        lambda b, n, t, s, p: p < LENGTH[b] if s < 0 else s == n,
    ],
    ids=["sees an earlier completion", "misses itself", "sees padding", "sees its future"],
)
def test_a_wrong_mask_gives_another_result(wrong):
    q, prompt, own = _completion_inputs()
    actual = completion_attention(q, *prompt, LENGTH, *own, SEEN)
    assert np.abs(actual - _dense(q, prompt, own, wrong)).max() > 1e-2


def _plain_completions(q, prompt_k, prompt_v, own_k, own_v, seen):
    """By the definition, differentiable: every score, one softmax, key-value heads repeated."""

    def joined(prompt, own):
        shared = jnp.broadcast_to(prompt[:, None], (B, K, *prompt.shape[1:]))
        return jnp.repeat(jnp.concatenate([shared, own], axis=2), H // KV, axis=3)

    keys, values = joined(prompt_k, own_k), joined(prompt_v, own_v)
    scores = jnp.einsum("bnqhe,bnthe->bnhqt", q, keys) / HD**0.5
    in_prompt = jnp.arange(P)[None, None, None, :] < LENGTH[:, None, None, None]
    in_prompt = jnp.broadcast_to(in_prompt, (B, K, C, P))
    in_past = jnp.arange(C)[None, None, None, :] < seen[..., None]
    visible = jnp.concatenate([in_prompt, in_past], axis=3)[:, :, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnhqt,bnthe->bnqhe", weights, values)


def test_gradients_of_completion_attention_are_those_of_its_definition():
    q, prompt, own = _completion_inputs()
    gradient = _normal(5, B, K, C, H, HD)
    # A first query that sees the prompt alone, and an absent completion, as a batch has them.
    seen = jnp.array([[[0, 1, 2, 3], [0, 0, 0, 0]], [[1, 2, 3, 4], [0, 1, 1, 4]]])
    ours = lambda q, pk, pv, ok, ov: completion_attention(q, pk, pv, LENGTH, ok, ov, seen)
    plain = lambda *inputs: _plain_completions(*inputs, seen)
    mixed, vjp = jax.vjp(ours, q, *prompt, *own)
    wanted, plain_vjp = jax.vjp(plain, q, *prompt, *own)
    np.testing.assert_allclose(mixed, wanted, atol=1e-5)
    for got, value in zip(vjp(gradient), plain_vjp(gradient), strict=True):
        np.testing.assert_allclose(got, value, atol=2e-5)
        assert np.abs(value).max() > 0.1


def test_num_seen_may_be_one_number_for_all_queries():
    q, prompt, own = _completion_inputs()
    attend = lambda seen: completion_attention(q, *prompt, LENGTH, *own, seen)
    wanted = attend(jnp.full((B, K, C), 2))
    np.testing.assert_array_equal(attend(jnp.full((1, 1, 1), 2)), wanted)
    np.testing.assert_array_equal(attend(jnp.full((B, K, 1), 2)), wanted)


def test_gradients_of_large_scores_are_finite():
    q, prompt, own = _completion_inputs()
    ours = lambda *x: completion_attention(100 * x[0], *x[1:3], LENGTH, *x[3:], SEEN).sum()
    for gradient in jax.grad(ours, argnums=(0, 1, 2, 3, 4))(q, *prompt, *own):
        assert np.isfinite(gradient).all()


def test_bfloat16_gradients_are_those_of_float32_to_its_precision():
    inputs = _completion_inputs()
    flat = jax.tree.leaves(inputs)
    gradient = _normal(5, B, K, C, H, HD)
    ours = lambda q, pk, pv, ok, ov: completion_attention(q, pk, pv, LENGTH, ok, ov, SEEN)
    wide = jax.vjp(ours, *flat)[1](gradient)
    narrow = jax.vjp(ours, *(x.astype("bfloat16") for x in flat))[1](gradient.astype("bfloat16"))
    for got, value in zip(narrow, wide, strict=True):
        assert got.dtype == jnp.bfloat16
        error = np.linalg.norm(got.astype(jnp.float32) - value)
        assert error < 0.02 * np.linalg.norm(value)


def test_single_queries_give_the_rows_of_the_whole():
    q, prompt, own = _completion_inputs()
    whole = completion_attention(q, *prompt, LENGTH, *own, SEEN)
    for t in range(C):
        row = completion_attention(q[:, :, t : t + 1], *prompt, LENGTH, *own, SEEN[:, :, t : t + 1])
        np.testing.assert_allclose(row[:, :, 0], whole[:, :, t], atol=1e-5)


def test_prompt_attention_is_completion_attention_without_a_prompt():
    q, _, own = _completion_inputs()
    first = [x[:, 0] for x in (q, *own)]
    actual = prompt_attention(*first, jnp.full((B,), C))
    sees = lambda b, n, t, s, p: s == n and p <= t
    empty = (jnp.zeros((B, 0, KV, HD)), jnp.zeros((B, 0, KV, HD)))
    np.testing.assert_allclose(actual, _dense(q, empty, own, sees)[:, 0], atol=1e-5)


def test_prompt_padding_is_never_seen():
    q, k, v = (_normal(i, B, P, heads, HD) for i, heads in enumerate((H, KV, KV)))
    valid = (jnp.arange(P)[None, :] < LENGTH[:, None])[..., None, None]
    mixed = prompt_attention(q, k, jnp.where(valid, v, 1e6), LENGTH)
    assert np.abs(jnp.where(valid, mixed, 0)).max() < 10


def test_a_query_that_has_seen_nothing_sees_the_whole_prompt_alone():
    q, prompt, own = _completion_inputs()
    actual = completion_attention(q, *prompt, LENGTH, *own, jnp.zeros((1, 1, C), int))
    sees = lambda b, n, t, source, position: source < 0 and position < LENGTH[b]
    np.testing.assert_allclose(actual, _dense(q, prompt, own, sees), atol=1e-5)


def test_softmax_is_taken_in_float32_for_bfloat16_inputs():
    q, k, v = (
        _normal(i, B, P, heads, HD).astype("bfloat16") for i, heads in enumerate((H, KV, KV))
    )
    jaxpr = str(jax.make_jaxpr(prompt_attention)(q, k, v, LENGTH))
    exponentials = [line for line in jaxpr.splitlines() if " exp " in line]
    assert exponentials and all("f32" in line for line in exponentials)
    assert attention.prompt_attention(q, k, v, LENGTH).dtype == jnp.bfloat16

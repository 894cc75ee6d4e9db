"""Log-probabilities against NumPy in float64, in chunks and whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax import logprobs

B, K, C, D, V = 2, 3, 7, 5, 11


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, K, C, D)).astype(np.float32)
    matrix = rng.normal(size=(D, V)).astype(np.float32)
    return hidden, matrix, rng.integers(0, V, size=(B, K, C))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def numpy_logp(hidden, matrix, tokens):
    logp = log_softmax(np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64))
    return np.take_along_axis(logp, np.asarray(tokens)[..., None], -1)[..., 0]


@functools.partial(jax.jit, static_argnames="chunk")
def value_and_gradients(hidden, matrix, tokens, weight, *, chunk=None):
    def total(hidden, matrix):
        logp = logprobs.hidden_to_logp(hidden, matrix, tokens, chunk=chunk)
        return (weight * logp).sum(), logp

    gradients, logp = jax.grad(total, (0, 1), has_aux=True)(hidden, matrix)
    return logp, *gradients


# --- hidden_to_logp ---


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100], ids=lambda chunk: f"chunk={chunk}")
def test_hidden_to_logp_and_its_gradients_equal_numpy_in_float64(inputs, chunk):
    """With chunks of one, of no divisor of C, of all of C and of more than C."""
    hidden, matrix, tokens = inputs
    weight = np.random.default_rng(1).normal(size=tokens.shape).astype(np.float32)
    logp, d_hidden, d_matrix = value_and_gradients(hidden, matrix, tokens, weight, chunk=chunk)
    assert logp.dtype == jnp.float32 and logp.shape == (B, K, C)
    np.testing.assert_allclose(logp, numpy_logp(hidden, matrix, tokens), rtol=1e-5, atol=1e-5)
    # ∂ ln p(token)/∂logits = onehot(token) − p.
    probabilities = np.exp(log_softmax(hidden.astype(np.float64) @ matrix))
    d_logits = weight[..., None] * (np.eye(V)[tokens] - probabilities)
    np.testing.assert_allclose(d_hidden, d_logits @ matrix.T, rtol=1e-4, atol=1e-5)
    expected = np.einsum("bkcd,bkcv->dv", hidden, d_logits)
    np.testing.assert_allclose(d_matrix, expected, rtol=1e-4, atol=1e-5)


def test_hidden_to_logp_equals_recorded_numbers():
    # Logits (ln 1, ln 2, ln 5): probabilities 1/8, 2/8, 5/8.
    hidden = jnp.ones((1, 1, 3, 1))
    matrix = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
    got = logprobs.hidden_to_logp(hidden, matrix, jnp.array([[[0, 1, 2]]]))
    np.testing.assert_allclose(got[0, 0], np.log([0.125, 0.25, 0.625]), rtol=1e-6)


def test_probabilities_of_all_tokens_sum_to_one_even_at_large_logits(inputs):
    hidden, matrix, _ = inputs
    every = jnp.broadcast_to(jnp.arange(V), (B, K, V))
    for scale in (1.0, 1e3):
        states = jnp.broadcast_to(scale * hidden[:, :, :1], (B, K, V, D))
        logp = jax.jit(logprobs.hidden_to_logp)(states, matrix, every)
        assert np.isfinite(logp).all()
        np.testing.assert_allclose(np.exp(logp).sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize(
    "token",
    [
        V,
        V + 100,
        -V - 1,
        -1,
    ],
)
def test_token_ids_outside_the_vocabulary_give_nan_there_and_only_there(inputs, token, chunk):
    hidden, matrix, tokens = inputs
    wrong = tokens.copy()
    wrong[1, 2, 4] = token
    got = np.asarray(logprobs.hidden_to_logp(hidden, matrix, jnp.asarray(wrong), chunk=chunk))
    assert np.isnan(got[1, 2, 4])
    assert np.isnan(got).sum() == 1


def test_indexing_instead_would_clamp_a_token_id_silently(inputs):
    hidden, matrix, _ = inputs
    logits = jnp.asarray(hidden @ matrix)[0, 0, 0]
    assert logits[jnp.array(V + 100)] == logits[V - 1]


def test_bfloat16_hidden_states_give_float32_numbers_accumulated_in_float32():
    # The logits are 257 and 256. bfloat16 has 8 bits: it takes both for 256 and answers −ln 2.
    size = 257
    hidden = jnp.ones((1, 1, 2, size), jnp.bfloat16)
    matrix = jnp.ones((size, 2)).at[0, 1].set(0.0)
    got = logprobs.hidden_to_logp(hidden, matrix, jnp.array([[[0, 1]]]))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[0, 0], [-np.log1p(np.exp(-1)), -np.log1p(np.exp(1))], rtol=1e-4)
    rounded = jax.nn.log_softmax(hidden[0, 0, 0] @ matrix.astype(jnp.bfloat16))
    np.testing.assert_allclose(np.asarray(rounded, np.float32), -np.log(2), rtol=1e-2)


@pytest.mark.parametrize("chunk", [None, 3])
def test_bfloat16_hidden_states_cost_only_the_rounding_of_the_inputs(inputs, chunk):
    hidden, matrix, tokens = inputs
    low, low_matrix = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(matrix, jnp.bfloat16)
    expected = numpy_logp(np.asarray(low, np.float64), np.asarray(low_matrix, np.float64), tokens)
    got, d_hidden, d_matrix = value_and_gradients(low, matrix, tokens, 1.0, chunk=chunk)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert got.dtype == jnp.float32
    assert d_hidden.dtype == jnp.bfloat16  # cotangents keep the dtype of what they belong to
    assert d_matrix.dtype == jnp.float32


def test_float32_inputs_never_pass_through_a_narrower_type(inputs):
    hidden, matrix, tokens = inputs
    jaxpr = str(jax.make_jaxpr(value_and_gradients)(hidden, matrix, tokens, 1.0))
    assert "bf16" not in jaxpr and "f16[" not in jaxpr


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "backward"])
def test_chunks_bound_the_memory_of_the_logits(differentiated):
    positions, vocabulary, chunk = 64, 4096, 8
    hidden = jnp.zeros((2, 2, positions, 8))
    matrix, tokens = jnp.zeros((8, vocabulary)), jnp.zeros((2, 2, positions), int)

    def temporary_bytes(chunk):
        def total(hidden, matrix):
            return logprobs.hidden_to_logp(hidden, matrix, tokens, chunk=chunk).sum()

        fn = jax.grad(total, (0, 1)) if differentiated else total
        return jax.jit(fn).lower(hidden, matrix).compile().memory_analysis().temp_size_in_bytes

    logits = 2 * 2 * positions * vocabulary * 4
    assert temporary_bytes(None) >= logits
    assert temporary_bytes(chunk) < logits / 2


def test_logits_exist_at_completion_positions_only(inputs):
    hidden, matrix, tokens = inputs
    jaxpr = str(
        jax.make_jaxpr(lambda h: logprobs.hidden_to_logp(h, matrix, tokens, chunk=3))(hidden)
    )
    assert f"f32[{B},{K},3,{V}]" in jaxpr
    assert f"f32[{B},{K},{C},{V}]" not in jaxpr


def test_hidden_to_logp_refuses_shapes_that_do_not_belong_together(inputs):
    hidden, matrix, tokens = inputs
    with pytest.raises(AssertionError, match="shape"):
        logprobs.hidden_to_logp(hidden, matrix, tokens[:, :, :-1])
    with pytest.raises(AssertionError, match="rank"):
        logprobs.hidden_to_logp(hidden, matrix[0], tokens)


# --- sum_logp and length_mask ---


def of_lengths(inputs, garbage=0.0):
    """Two prompts with completions of random lengths; `garbage` is what lies beyond them."""
    hidden, matrix, tokens = inputs
    lengths = np.array([[C, 1, 3], [2, 5, 1]])
    present = np.arange(C) < lengths[..., None]
    return np.where(present[..., None], hidden, garbage).astype(np.float32), matrix, tokens, lengths


def group_logp(hidden, matrix, tokens, lengths):
    return logprobs.sum_logp(logprobs.hidden_to_logp(hidden, matrix, tokens), lengths)


def test_ln_pi_of_a_completion_sums_its_tokens_whatever_lies_beyond(inputs):
    hidden, matrix, tokens, lengths = of_lengths(inputs)
    expected = [
        [
            numpy_logp(hidden[b, k, :n], matrix, tokens[b, k, :n]).sum()
            for k, n in enumerate(lengths[b])
        ]
        for b in range(B)
    ]
    for garbage in (0.0, 1e3):
        got = group_logp(*map(jnp.asarray, of_lengths(inputs, garbage)))
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_sum_logp_is_the_sum_of_the_first_length_tokens_not_the_mean():
    token_logp = jnp.array([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]])
    got = [logprobs.sum_logp(token_logp, jnp.full(2, n)) for n in range(4)]
    np.testing.assert_array_equal(got, [[0, 0], [-1, -8], [-3, -24], [-7, -56]])


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_sum_logp_and_its_gradient_ignore_what_lies_beyond_the_length(garbage):
    length = jnp.array([[2, 0], [3, 1]])
    present = np.arange(3) < np.asarray(length)[..., None]
    token_logp = jnp.where(present, -1.5, garbage)
    np.testing.assert_array_equal(logprobs.sum_logp(token_logp, length), -1.5 * length)
    slope = jax.grad(lambda t: logprobs.sum_logp(t, length).sum())(token_logp)
    np.testing.assert_array_equal(slope, present.astype(np.float32))


def test_any_padding_token_leaves_the_gradient_of_a_completion_alone(inputs):
    """Even one outside the vocabulary, whose own log-probability is NaN."""
    hidden, matrix, tokens, lengths = of_lengths(inputs)
    slope = jax.jit(jax.grad(lambda m, tokens: group_logp(hidden, m, tokens, lengths).sum()))
    padding = np.arange(C) >= lengths[..., None]
    expected = slope(matrix, tokens)
    for token in (1, V, V + 5):
        got = slope(matrix, jnp.where(padding, token, tokens))
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7, err_msg=str(token))


def test_length_mask_is_true_before_the_length():
    got = logprobs.length_mask(jnp.array([[0, 1], [3, 9]]), 3)
    np.testing.assert_array_equal(got, [[[0, 0, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 1]]])
    assert got.dtype == bool


def test_sum_logp_refuses_lengths_of_another_shape():
    with pytest.raises(AssertionError, match="shape"):
        logprobs.sum_logp(jnp.zeros((2, 3, 4)), jnp.ones((2, 4), int))

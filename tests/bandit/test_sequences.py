"""Theorem 1 and the properties for sequence-level policies, through the code that trains Llama
(float32 there)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax import losses
from copg_jax.bandit import exact, population, sequences
from copg_jax.bandit.exact import make_bandit
from copg_jax.errors import InputError

VOCAB, LENGTH, PROMPTS = 3, 3, 2


def prompt_features(features: np.ndarray, num_prompts: int) -> np.ndarray:
    """Gives every prompt its own rows of the output matrix, so that prompts share no parameters.

    Args:
        features: hidden state of each prefix; [number of prefixes, D].
        num_prompts: B.

    Returns:
        Block-diagonal, [B, number of prefixes, B·D].
    """
    blocks = np.einsum("bc,pd->bpcd", np.eye(num_prompts, dtype=features.dtype), features)
    return blocks.reshape(num_prompts, len(features), -1)


@pytest.fixture
def tiny():
    """Two prompts, every completion of a vocabulary of 3 up to 3 tokens, a table policy, a random
    problem."""
    completions = sequences.enumerate_completions(VOCAB, LENGTH)
    features = sequences.prefix_features(completions, VOCAB, shared=False)
    features = jnp.asarray(prompt_features(features, PROMPTS))
    rng = np.random.default_rng(0)
    shape = (PROMPTS, len(completions.tokens))
    ref_table = rng.normal(size=(features.shape[-1], VOCAB)).astype(np.float32)
    ref = np.exp(
        np.asarray(sequences.completion_logp(jnp.asarray(ref_table), features, completions), float)
    )
    bandit = make_bandit(
        rng.normal(size=shape),
        ref=ref / ref.sum(-1, keepdims=True),
        mu1=rng.dirichlet(np.full(shape[1], 2.0), size=PROMPTS),
        mu2=rng.dirichlet(np.full(shape[1], 2.0), size=PROMPTS),
        beta=0.7,
    )
    logp = lambda table: sequences.completion_logp(table, features, completions).astype(float)
    table = jnp.asarray(rng.normal(size=ref_table.shape), jnp.float32)
    return bandit, logp, table, jnp.asarray(ref_table)


def pairs_of(values, first, second):
    return jnp.stack([values[:, first], values[:, second]], axis=-1)


@pytest.mark.parametrize(("vocab_size", "max_length", "number"), [(2, 4, 5), (3, 4, 31), (3, 1, 3)])
def test_completions_are_all_there_once_and_sum_to_one(vocab_size, max_length, number):
    completions = sequences.enumerate_completions(vocab_size, max_length)
    texts = {tuple(t[:n]) for t, n in zip(completions.tokens, completions.length, strict=True)}
    assert len(texts) == len(completions.tokens) == number
    for shared in (False, True):
        features = sequences.prefix_features(completions, vocab_size, shared=shared)
        table = jax.random.normal(jax.random.key(0), (features.shape[1], vocab_size), jnp.float32)
        logp = sequences.completion_logp(table, jnp.asarray(features)[None], completions)
        np.testing.assert_allclose(jnp.exp(logp).sum(), 1.0, rtol=1e-6)


def test_log_probabilities_equal_a_token_by_token_computation():
    completions = sequences.enumerate_completions(3, 3)
    features = sequences.prefix_features(completions, 3, shared=True)
    table = np.random.default_rng(1).normal(size=(features.shape[1], 3)).astype(np.float32)
    logp = sequences.completion_logp(jnp.asarray(table), jnp.asarray(features)[None], completions)
    for tokens, length, value in zip(completions.tokens, completions.length, logp[0], strict=True):
        total = 0.0
        for i in range(length):
            state = features[completions.prefixes.index(tuple(tokens[:i].tolist()))]
            scores = (state @ table).astype(float)
            total += scores[tokens[i]] - np.log(np.exp(scores).sum())
        np.testing.assert_allclose(value, total, atol=1e-5)


def test_the_maximiser_of_l_over_autoregressive_policies_is_pi_star(tiny):
    """Newton steps on the table of conditionals, from π_ref; as exact as float32 log-probabilities
    are."""
    bandit, logp, _, ref_table = tiny
    shape = ref_table.shape
    objective = lambda flat: exact.copg_population_objective(
        logp(flat.reshape(shape).astype(jnp.float32)), bandit
    )
    flat = ref_table.reshape(-1).astype(float)
    value_and_slope = jax.jit(lambda x: (jax.grad(objective)(x), jax.hessian(objective)(x)))
    for damping in (0.1, 0.01, 1e-3, *[1e-6] * 12):
        slope, curvature = value_and_slope(flat)
        flat = flat + jnp.linalg.solve(damping * jnp.eye(flat.size) - curvature, slope)
    end = logp(flat.reshape(shape).astype(jnp.float32))
    assert exact.total_variation(end, exact.optimal_policy(bandit)) < 1e-5
    assert exact.total_variation(logp(ref_table), exact.optimal_policy(bandit)) > 0.1


def test_property_1_holds_for_sequences(tiny):
    bandit, logp, table, _ = tiny
    policy = jnp.exp(logp(table))
    on_policy = bandit._replace(mu1=policy, mu2=policy)
    left = jax.jit(jax.grad(lambda t: exact.copg_population_objective(logp(t), on_policy)))(table)
    right = jax.jit(jax.grad(lambda t: exact.rl_objective(logp(t), bandit)))(table)
    np.testing.assert_allclose(left, 2 * right, atol=3e-6)
    assert jnp.abs(right).max() > 0.01


def test_equation_7_holds_for_sequences(tiny):
    """Σ_y c(y) ∇ln π(y) with the closed-form c, against autodiff of L through the token
    log-probabilities."""
    bandit, logp, table, _ = tiny
    value, pull_back = jax.vjp(logp, table)
    coefficients = population.GRADIENTS["copg"](value, bandit)
    (closed,) = pull_back(bandit.context_prob[:, None] * coefficients)
    autodiff = jax.jit(jax.grad(lambda t: exact.copg_population_objective(logp(t), bandit)))(table)
    np.testing.assert_allclose(closed, autodiff, atol=3e-6)


def test_properties_2_and_3_hold_for_sequences(tiny):
    bandit, logp, table, _ = tiny
    first, second = jnp.array([0, 3, 5, 9]), jnp.array([2, 7, 1, 4])
    reward = pairs_of(bandit.reward, first, second)
    ratio = lambda t: pairs_of(exact.log_ratio(logp(t), bandit), first, second)
    slope = lambda fn: jax.jit(jax.grad(lambda t: fn(ratio(t)).sum()))(table)
    beta = 0.7
    copg = slope(lambda x: losses.copg_objective(x, reward, beta=beta))
    rloo = slope(lambda x: losses.rloo_objective(x, reward, beta=beta))
    np.testing.assert_allclose(copg, rloo, atol=1e-5)
    quarter = jnp.where(reward > reward[..., ::-1], 0.25, -0.25)
    signed = slope(lambda x: losses.copg_objective(x, quarter, beta=beta))
    ipo = slope(lambda x: losses.ipo_loss(x, reward, beta=beta))
    np.testing.assert_allclose(signed, -ipo / (2 * beta), atol=1e-5)
    assert jnp.abs(signed - copg).max() > 0.01


def test_sizes_too_small_are_refused():
    with pytest.raises(InputError, match="vocab_size"):
        sequences.enumerate_completions(1, 3)
    with pytest.raises(InputError, match="max_length"):
        sequences.enumerate_completions(2, 0)

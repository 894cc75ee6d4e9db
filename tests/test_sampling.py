"""The sampler: log-probabilities of training, greedy, EOS, early stop, independent draws."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax import sampling
from copg_jax.data.groups import GroupBatch
from copg_jax.models import decoding
from copg_jax.models.decoder import Decoder
from copg_jax.models.forward import make_token_logp
from copg_jax.models.layout import Capacity, Shape, pack
from copg_jax.models.params import init_params
from copg_jax.sampling import Samples, make_sampler, row_keys
from tests.models import tiny
from tests.toys import LLAMA, mesh

EOS, B, K, P, C = 3, 8, 40, 7, 6
ARCH = dataclasses.replace(LLAMA, vocab_size=8)
LENGTH = np.array([1, 7, 3, 1, 5, 2, 6, 4], np.int32)  # right-padded with garbage
PROMPTS = np.random.default_rng(0).integers(0, ARCH.vocab_size, (B, P)).astype(np.int32)
trips: list[int] = []


@pytest.fixture(scope="module")
def params() -> Any:
    """Weights large enough that tokens matter, still far from one-hot predictions."""
    drawn = init_params(ARCH, jax.random.key(1))
    return jax.tree.map(lambda x: x if x.ndim == 1 else 4 * x, drawn)


def sampler_on(on: jax.sharding.Mesh, num_samples: int, temperature: float) -> sampling.Sampler:
    """A sampler of the tiny model on a mesh."""
    return make_sampler(
        ARCH,
        end_ids=[EOS],
        max_new_tokens=C,
        num_samples=num_samples,
        temperature=temperature,
        mesh=on,
    )


@pytest.fixture(scope="module")
def sample() -> sampling.Sampler:
    """K = 40 samples at temperature 1 on one device; `trips` grows by one per decode step."""
    decode_step = decoding.decode_step

    def counted(*args: Any) -> Any:
        jax.debug.callback(lambda: trips.append(1))
        return decode_step(*args)

    sampler = sampler_on(mesh(), K, 1.0)

    def call(params: Any, prompts: Any, length: Any, keys: Any) -> Samples:
        with pytest.MonkeyPatch.context() as patch:  # seen by the trace, at the first call
            patch.setattr(decoding, "decode_step", counted)
            samples = jax.device_get(sampler(params, prompts, length, None, keys))
        jax.effects_barrier()
        return samples

    return call


@pytest.fixture(scope="module")
def samples(sample, params) -> Samples:
    """Samples of the eight prompts."""
    return sample(params, PROMPTS, LENGTH, row_keys(0, 0, B))


def group_of(samples: Samples) -> GroupBatch:
    """The samples as a batch to train on."""
    blank = np.zeros(samples.length.shape, np.float32)
    return GroupBatch(PROMPTS, LENGTH, samples.tokens, samples.length, blank, blank)


def test_sampler_log_probabilities_are_those_of_training(samples, params):
    wanted = jax.jit(make_token_logp(ARCH))(params, group_of(samples))
    live = np.arange(C)[None, None, :] < samples.length[..., None]
    np.testing.assert_allclose(samples.token_logp[live], np.asarray(wanted)[live], atol=1e-5)
    assert (samples.token_logp[~live] == 0).all()


def test_a_completion_ends_with_its_first_eos_which_counts(samples):
    assert 0.2 < samples.has_eos.mean() < 0.98
    for tokens, length, has_eos in zip(
        samples.tokens.reshape(-1, C), samples.length.ravel(), samples.has_eos.ravel(), strict=True
    ):
        found = np.flatnonzero(tokens[:length] == EOS)
        assert list(found) == ([length - 1] if has_eos else [])
        assert has_eos or length == C
        assert (tokens[length:] == 0).all()


def test_draws_at_temperature_one_have_the_model_s_distribution(sample, params):
    prompts = np.tile(PROMPTS[1], (B, 1))
    length = np.full(B, LENGTH[1])
    drawn = [sample(params, prompts, length, row_keys(0, at, B)) for at in range(5)]
    first = np.concatenate([s.tokens[..., 0].ravel() for s in drawn])
    logp = np.concatenate([s.token_logp[..., 0].ravel() for s in drawn])
    count = np.bincount(first, minlength=ARCH.vocab_size)
    hidden = tiny.plain_hidden(ARCH, params, jnp.asarray(PROMPTS[1:2]))[0, LENGTH[1] - 1]
    expected = np.asarray(jax.nn.softmax(hidden @ Decoder(ARCH).output_matrix(params))) * len(first)
    assert expected.max() < 0.7 * len(first)
    chi_square = ((count - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # 7 degrees of freedom, 1 in 1,000
    np.testing.assert_allclose(np.exp(logp), expected[first] / len(first), rtol=1e-4)


@pytest.mark.parametrize("size", [5, 128, 300])
def test_a_token_is_drawn_where_the_running_total_passes_the_random_number(size, rng):
    weights = rng.integers(0, 4, size).astype(np.float32)  # exact sums; some tokens impossible
    weights[[0, -1]] = 0
    total = int(weights.sum())
    uniform = np.append((np.arange(total) + 0.5) / total, 1 - 2.0**-24).astype(np.float32)
    rows = np.broadcast_to(weights, (1, len(uniform), size))
    drawn = np.asarray(sampling._draw(jnp.asarray(rows), jnp.asarray(uniform[None])))[0]
    np.testing.assert_array_equal(np.bincount(drawn[:-1], minlength=size), weights)
    assert drawn[-1] == np.flatnonzero(weights)[-1]
    assert drawn.dtype == np.int32 and (np.diff(drawn) >= 0).all()


def test_rounding_between_runs_never_draws_an_impossible_token(rng):
    # Running totals of many runs round, so that less than nothing can be left inside the one found.
    weights = np.where(rng.random((40, 32 * sampling._RUN)) < 0.02, rng.random(), 0.0)
    weights = (weights * rng.random(weights.shape)).astype(np.float32)
    totals = weights.reshape(40, 32, -1).sum(-1)
    uniform = np.cumsum(totals, -1) / totals.sum(-1, keepdims=True)
    uniform = np.minimum(uniform, 1 - 2.0**-24).astype(np.float32)
    rows = np.broadcast_to(weights[:, None], (40, 32, weights.shape[-1]))
    drawn = np.asarray(jax.jit(sampling._draw)(jnp.asarray(rows), jnp.asarray(uniform)))
    assert (np.take_along_axis(weights, drawn, axis=1) > 0).all()


def test_samples_of_a_prompt_differ_and_a_step_has_its_own_draws(sample, samples, params):
    assert len({tuple(row) for row in samples.tokens[1]}) > K // 4
    again = sample(params, PROMPTS, LENGTH, row_keys(0, 0, B))
    np.testing.assert_array_equal(again.tokens, samples.tokens)
    later = sample(params, PROMPTS, LENGTH, row_keys(0, 1, B))
    assert (later.tokens != samples.tokens).any()


def test_the_draws_of_a_row_do_not_depend_on_its_batch(sample, samples, params):
    order = np.array([5, 0, 3, 3, 7, 1, 2, 6])
    moved = sample(params, PROMPTS[order], LENGTH[order], row_keys(0, 0, B)[order])
    np.testing.assert_array_equal(moved.tokens, samples.tokens[order])


def test_generation_stops_when_every_row_has_ended(sample, params):
    # Without attention and MLP the hidden state is all ones; the head then only knows EOS.
    sure = jax.tree.map(jnp.zeros_like, params)
    sure |= {"embed_tokens": jnp.ones_like(params["embed_tokens"]), "norm": params["norm"]}
    sure["lm_head"] = jnp.zeros_like(params["lm_head"]).at[:, EOS].set(10.0)
    trips.clear()
    ended = sample(sure, PROMPTS, LENGTH, row_keys(0, 0, B))
    assert (ended.length == 1).all() and ended.has_eos.all() and not trips
    never = sure | {"lm_head": sure["lm_head"].at[:, EOS].set(-10.0)}
    endless = sample(never, PROMPTS, LENGTH, row_keys(0, 0, B))
    assert (endless.length == C).all() and not endless.has_eos.any() and len(trips) == C - 1


def test_each_of_the_end_tokens_ends_a_completion(params):
    ends = make_sampler(ARCH, end_ids=[EOS, 5], max_new_tokens=C, num_samples=K, mesh=mesh())
    samples = jax.device_get(ends(params, PROMPTS, LENGTH, None, row_keys(0, 0, B)))
    last = np.take_along_axis(samples.tokens, samples.length[..., None] - 1, axis=2)[..., 0]
    assert {*last[samples.has_eos].tolist()} == {EOS, 5}
    is_end = np.isin(samples.tokens, [EOS, 5]) & (np.arange(C) < samples.length[..., None])
    np.testing.assert_array_equal(is_end.sum(-1), samples.has_eos)
    assert (samples.length[~samples.has_eos] == C).all() and not samples.has_eos.all()


def test_places_without_a_prompt_generate_nothing_and_are_not_waited_for(sample, samples, params):
    trips.clear()
    nowhere = sample(params, PROMPTS, np.zeros(B, np.int32), row_keys(0, 0, B))
    assert nowhere.has_eos.all() and not nowhere.length.any() and not nowhere.tokens.any()
    assert not trips
    missing = np.array([0, 0, 1, 0, 0, 1, 0, 0], bool)
    some = sample(params, PROMPTS, np.where(missing, 0, LENGTH), row_keys(0, 0, B))
    assert not some.length[missing].any() and not some.token_logp[missing].any()
    np.testing.assert_array_equal(some.tokens[~missing], samples.tokens[~missing])


def test_greedy_is_the_most_likely_token_of_the_whole_text_recomputed(params):
    keys = row_keys(0, 0, B)
    greedy = jax.device_get(sampler_on(mesh(), 1, 0.0)(params, PROMPTS, LENGTH, None, keys))
    matrix = Decoder(ARCH).output_matrix(params)
    texts = np.zeros((B, P + C), np.int32)
    for b in range(B):
        texts[b, : LENGTH[b]] = PROMPTS[b, : LENGTH[b]]
    live = np.ones(B, bool)
    length = np.zeros(B, int)
    for at in range(C):
        hidden = tiny.plain_hidden(ARCH, params, jnp.asarray(texts))
        logp = np.asarray(jax.nn.log_softmax(hidden @ matrix))[np.arange(B), LENGTH + at - 1]
        token = logp.argmax(-1)
        np.testing.assert_array_equal(greedy.tokens[live, 0, at], token[live])
        np.testing.assert_allclose(greedy.token_logp[live, 0, at], logp.max(-1)[live], atol=1e-5)
        texts[np.arange(B), LENGTH + at] = token
        length += live
        live &= token != EOS
    np.testing.assert_array_equal(greedy.length[:, 0], length)


@pytest.mark.parametrize(
    ("mu", "num_kept"),
    [({"temperature": 0.7, "top_k": 3}, 3), ({"temperature": 2.0, "top_p": 0.6}, None)],
    ids=str,
)
def test_ln_mu_is_that_of_what_was_drawn_from_and_ln_pi_stays_that_of_the_model(
    params, mu, num_kept
):
    sizes = {"max_new_tokens": 1, "num_samples": K}
    sampler: Any = make_sampler(ARCH, end_ids=[EOS], mesh=mesh(), **sizes, **mu)
    keys = row_keys(0, 0, B)
    drawn = jax.device_get(sampler(params, PROMPTS, LENGTH, None, keys))
    hidden = tiny.plain_hidden(ARCH, params, jnp.asarray(PROMPTS))[np.arange(B), LENGTH - 1]
    logits = np.asarray(hidden @ Decoder(ARCH).output_matrix(params), np.float64)
    for b in range(B):
        scaled = logits[b] / mu.get("temperature", 1.0)
        order = np.argsort(-scaled)
        probs = np.exp(scaled - scaled.max())
        probs /= probs.sum()
        count = num_kept
        if count is None:  # as few as a total of top_p takes
            count = int(np.searchsorted(np.cumsum(probs[order]), mu["top_p"])) + 1
            assert count < 8
        wanted = np.zeros(8)
        wanted[order[:count]] = probs[order[:count]] / probs[order[:count]].sum()
        tokens = drawn.tokens[b, :, 0]
        assert set(tokens.tolist()) <= set(order[:count].tolist())
        np.testing.assert_allclose(np.exp(drawn.mu_token_logp[b, :, 0]), wanted[tokens], rtol=1e-4)
        logp = logits[b] - np.log(np.exp(logits[b] - logits[b].max()).sum()) - logits[b].max()
        np.testing.assert_allclose(drawn.token_logp[b, :, 0], logp[tokens], atol=1e-4)


def test_eight_devices_draw_what_one_device_draws(samples, params):
    shape = Shape(4, (P,) * (B // 4), P, K, C, Capacity(11, 0))
    layout, keys = shape.prompt_layout(LENGTH), row_keys(0, 0, B)
    on_eight = sampler_on(mesh(1, 4, 2), K, 1.0)(params, PROMPTS, LENGTH, layout, keys)
    np.testing.assert_array_equal(on_eight.tokens, samples.tokens)
    np.testing.assert_array_equal(on_eight.length, samples.length)
    np.testing.assert_allclose(on_eight.token_logp, samples.token_logp, atol=1e-5)


@pytest.mark.parametrize("on", [(1, 1, 1), (1, 4, 1)], ids=str)
def test_buckets_draw_what_one_bucket_draws(samples, params, on):
    num_bins = math.prod(on)
    num_tokens = np.stack([LENGTH, np.zeros(B, int)], axis=1)
    packed = pack(num_tokens, batch_size=B, num_bins=num_bins, sizes=(P, K, C))
    (rows,) = packed.rows
    # As narrow as the longest prompt of each place, which no run would cut so fine.
    widths = tuple(LENGTH[rows].reshape(num_bins, -1).max(0).tolist())
    assert len(set(widths)) > 1
    shape = packed.shape._replace(prompt_sizes=widths, capacity=Capacity(29, 0))
    layout, keys = shape.prompt_layout(LENGTH[rows]), row_keys(0, 0, B)[rows]
    found = sampler_on(mesh(*on), K, 1.0)(params, PROMPTS[rows], LENGTH[rows], layout, keys)
    np.testing.assert_array_equal(found.tokens, samples.tokens[rows])
    np.testing.assert_array_equal(found.length, samples.length[rows])
    np.testing.assert_allclose(found.token_logp, samples.token_logp[rows], atol=1e-5)

"""Claims about the generated data: same for a seed, real schema, learnable differences."""

import random
from pathlib import Path

import pytest

from copg_jax.config.sections import DataConfig
from copg_jax.data.dataset import prepare
from copg_jax.data.formats.tldr import Post, format_prompt
from copg_jax.data.reader import GroupReader
from copg_jax.data.tokenizer import Encoder, load_tokenizer, tokenizer_hash
from copg_jax.errors import InputError
from experiments.generated import write_generated
from experiments.generated.posts import (
    Facts,
    facts_of,
    latent_reward,
    latent_utility,
    make_post,
    make_summary,
)

SIZES = {"num_examples": 400, "num_comparisons": 400, "seed": 3, "vocab_size": 640}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small generated data set."""
    place = tmp_path_factory.mktemp("generated")
    write_generated(place, **SIZES)
    return place


def test_the_same_seed_writes_the_same_files(folder, tmp_path):
    for seed, same in ((3, True), (4, False)):
        write_generated(tmp_path, **(SIZES | {"seed": seed}))
        for name in ("sft.jsonl", "comparisons.jsonl"):
            assert ((tmp_path / name).read_bytes() == (folder / name).read_bytes()) == same
        assert (
            tokenizer_hash(load_tokenizer(tmp_path / "tokenizer"))
            == tokenizer_hash(load_tokenizer(folder / "tokenizer"))
            or not same
        )


def test_the_rows_read_as_openai_s_and_are_short(folder, tmp_path):
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert len(tokenizer) <= 640 and Encoder(tokenizer).prefix == [tokenizer.bos_token_id]
    for name, count in (("sft", 1), ("comparisons", 2)):
        config = DataConfig(path=str(folder / f"{name}.jsonl"))
        dataset = prepare(
            GroupReader(config),
            tokenizer,
            path=tmp_path / f"{name}.arrow",
            limits=config.limits,
            vocab_size=len(tokenizer),
        )
        stats = dataset.stats
        assert stats["kept"] == 400 and stats["completions"]["max"] == count
        assert 60 <= stats["prompt_tokens"]["mean"] <= 90 and stats["prompt_tokens"]["max"] < 120
        assert 8 <= stats["completion_tokens"]["mean"] <= 20
        words = sum(len(group.prompt.split()) for group in dataset)
        tokens = sum(len(group.prompt_tokens) for group in dataset)
        assert tokens < 1.5 * words


def test_choices_follow_the_utility_as_often_as_bradley_terry_says(folder):
    agreements = []
    for group in GroupReader(DataConfig(path=str(folder / "comparisons.jsonl"))):
        first, second = latent_reward([group.prompt] * 2, group.completions)
        if first != second:
            agreements.append((first > second) == (group.rewards[0] > group.rewards[1]))
    assert 0.8 < sum(agreements) / len(agreements) < 0.95
    first = [g.rewards[0] for g in GroupReader(DataConfig(path=str(folder / "comparisons.jsonl")))]
    assert 0.4 < sum(first) / len(first) < 0.6


def test_facts_are_read_back_from_the_post():
    post = Post(
        "advice",
        "My boss lost my dog",
        "I was at the park with my boss today. should I let it go?",
    )
    assert facts_of(post) == Facts("boss", "lost", "dog", "park", "should I let it go?")
    rng = random.Random(0)
    for _ in range(50):
        post = make_post(rng)
        assert set(facts_of(post)[:3]) <= set(post.title.split())


def test_each_flaw_lowers_the_utility():
    post = Post(
        "advice",
        "My boss lost my dog",
        "I was at the park with my boss today. should I let it go?",
    )
    good = latent_utility(post, " my boss lost my dog at the park, should I let it go?")
    assert good == 5.5
    for flawed, lost in [
        ("my sister lost my dog at the park, should I let it go?", 3.0),
        ("my boss lost my lamp at the park, should I let it go?", 3.0),
        ("my boss lost my dog at the park.", 1.5),
        ("my boss was not so good, should I let it go?", 2.5),
        ("so basically my boss lost my dog at the park you know, should I let it go?", 3.2),
    ]:
        assert latent_utility(post, flawed) == pytest.approx(good - lost)
    long = "my boss lost my dog at the park" + " and so" * 10 + ", should I let it go?"
    assert latent_utility(post, long) < good - 2


def test_summaries_are_a_mixture_with_room_for_improvement():
    rng = random.Random(1)
    utilities = []
    for _ in range(500):
        post = make_post(rng)
        utilities.append(latent_utility(post, make_summary(rng, post)))
    best = sum(utility == 5.5 for utility in utilities) / 500
    assert 0.3 < best < 0.45
    assert 2.5 < sum(utilities) / 500 < 4.0


def test_other_prompts_cannot_be_graded():
    with pytest.raises(InputError, match=r"generated posts only, got prompt 'Say a.'"):
        latent_reward(["Say a."], ["a"])
    with pytest.raises(InputError, match="generated posts only, got a post titled 'Hi'"):
        latent_reward([format_prompt(Post("x", "Hi", "there"))], ["a"])

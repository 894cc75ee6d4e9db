"""Claims about the TL;DR prompt: format, parsing, cutting, split by post."""

import bisect
import random

import pytest

from copg_jax.data.formats import tldr
from copg_jax.data.formats.tldr import (
    Post,
    Tldr,
    format_prompt,
    is_news_prompt,
    normalize_completion,
    parse_prompt,
    post_fraction,
    truncate_prompt,
)
from copg_jax.data.tokenizer import Encoder


def literal_cut(prompt: str, token_ends, max_tokens: int) -> str | None:
    """The rule word for word: one cut, one count, again."""
    post = parse_prompt(prompt)
    assert post is not None
    while len(token_ends(format_prompt(post))) > max_tokens:
        post = post._replace(post=post.post[: post.post.rfind("\n")])
        if not post.post.strip():
            return None
    return format_prompt(post)


def test_the_prompt_has_openai_s_exact_format_and_no_trailing_blank():
    text = format_prompt(Post("tifu", "My bike", "It broke."))
    assert text == "SUBREDDIT: r/tifu\n\nTITLE: My bike\n\nPOST: It broke.\n\nTL;DR:"


@pytest.mark.parametrize("post", ["x", "a\n\nTL;DR: b", "\nPOST: c\n", " lead and trail \n\n\n"])
def test_parsing_undoes_formatting(post):
    fields = Post("AskReddit", "a: b", post)
    assert parse_prompt(format_prompt(fields)) == fields


@pytest.mark.parametrize("end", ["\nTL;DR: ", "\nTL;DR:", ""])
def test_carper_prompts_parse_to_the_same_post(end):
    assert parse_prompt("SUBREDDIT: r/x\nTITLE: t\nPOST: p\nq" + end) == Post("x", "t", "p\nq")


@pytest.mark.parametrize(
    "post", ["a" + " " * 300_000 + "b", "a" + "\n\nPOST: " * 100_000, "\n\nTL;DR:" * 100_000 + "b"]
)
@pytest.mark.parametrize("frame", ["SUBREDDIT: r/x\nTITLE: t\nPOST: {}\nTL;DR:", "{}", "OpenAI"])
def test_a_long_post_is_parsed_in_one_go(frame, post):
    """A run that tries every place for the end of the frame would not come back."""
    if frame == "OpenAI":
        assert parse_prompt(format_prompt(Post("x", "t", post))) == Post("x", "t", post)
        assert parse_prompt(format_prompt(Post("x", "t", post)) + "b") is None
    else:
        parsed = parse_prompt(frame.format(post))
        assert parsed == (None if frame == "{}" else Post("x", "t", post))


def test_other_prompts_and_news_are_told_apart():
    assert parse_prompt("Summarise: p") is None
    assert parse_prompt("SUBREDDIT: r/x\nTITLE: t\nPOST: ") == Post("x", "t", "")
    assert is_news_prompt("TITLE: t\n\narticle\n\nTL;DR:")
    assert not is_news_prompt(format_prompt(Post("x", "t", "p")))


def test_completions_get_exactly_one_leading_blank_however_often():
    for text in ("a", " a", "  a"):
        assert normalize_completion(text) == " a"
        assert normalize_completion(normalize_completion(text)) == " a"


@pytest.mark.parametrize("kind", ["plain", "with_bos", "llama2_like"])
def test_cutting_gives_what_the_literal_rule_gives(kind, request):
    ends = Encoder(request.getfixturevalue(kind)).token_ends
    rng = random.Random(0)
    words = ["bike", "aaaa", "brother", "ü€😀", "0123", " ", "  ", ".", "\n", "\n\n", "know", "x"]
    outcomes = set()
    for _ in range(60):
        text = "".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randint(1, 60)))
        prompt = format_prompt(
            Post("x", "t", text if rng.random() < 0.5 else text.replace("\n", ""))
        )
        limit = rng.randint(20, 90)
        cut = truncate_prompt(prompt, ends, limit)
        assert cut == literal_cut(prompt, ends, limit)
        outcomes.add("none" if cut is None else "whole" if cut == prompt else "cut")
    assert outcomes == {"none", "whole", "cut"}


def test_a_long_post_without_newlines_is_cut_with_few_token_counts(plain):
    encoder, calls = Encoder(plain), []

    def ends(text):
        calls.append(len(text))
        return encoder.token_ends(text)

    prompt = format_prompt(Post("x", "t", "my bike broke at the park " * 400))
    cut = truncate_prompt(prompt, ends, 64)
    assert cut is not None and 60 < len(encoder.token_ends(cut)) <= 64
    assert len(calls) < 200


@pytest.mark.parametrize("post", ["a" * 800_000, "a " + "\u3000" * 799_998, "ab\n" * 266_000])
def test_a_very_long_post_is_cut_in_steps_that_do_not_grow_with_it(plain, monkeypatch, post):
    calls = []

    def bisect_right(*arguments):
        calls.append(arguments)
        assert len(calls) < 100  # it was once for each character, with a copy of the text each
        return bisect.bisect_right(*arguments)

    monkeypatch.setattr(tldr, "bisect_right", bisect_right)
    ends = Encoder(plain).token_ends
    cut = truncate_prompt(format_prompt(Post("x", "t", post)), ends, 128)
    assert cut is not None and 100 < len(ends(cut)) <= 128


def test_what_cannot_be_cut_gives_none(plain):
    ends = Encoder(plain).token_ends
    assert truncate_prompt("bike " * 50, ends, 20) is None
    assert truncate_prompt(format_prompt(Post("x", "title " * 50, "post")), ends, 20) is None


def test_copies_of_one_post_fall_on_one_side_of_the_split():
    post = Post("x", "My bike", "word " * 60 + "\n\n" + "end " * 60)
    whole = format_prompt(post)
    copies = [
        format_prompt(post._replace(post=post.post[:300])),
        format_prompt(post._replace(post=post.post.replace("\n\n", "\n"))),
        f"SUBREDDIT: r/x\nTITLE: My bike\nPOST: {post.post}\nTL;DR: ",
    ]
    assert {post_fraction(copy) for copy in copies} == {post_fraction(whole)}
    assert post_fraction(whole) != post_fraction(format_prompt(post._replace(title="My car")))


def test_the_split_s_fractions_are_uniform():
    values = sorted(post_fraction(format_prompt(Post("x", str(i), "p"))) for i in range(2000))
    assert max(abs(value - i / 2000) for i, value in enumerate(values)) < 0.04


def test_the_hash_of_the_conventions_is_recorded_and_follows_each_of_them(monkeypatch):
    # Scored data of the conventions that this number stands for is refused where it changes.
    assert Tldr().hash == "ca17db99e99a5d0a"
    hashes = {Tldr().hash}
    for name, other in (
        ("VERSION", 3),
        ("_SUFFIX", "\n\nTL;DR: "),
        ("normalize_completion", lambda text: text),
        ("_head", lambda post: f"TITLE: {post.title}\n\nPOST: "),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(tldr, name, other)
            hashes.add(Tldr().hash)
    assert len(hashes) == 5

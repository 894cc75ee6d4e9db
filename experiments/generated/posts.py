"""Made-up posts: the schema of the real data, small enough for a tiny model on a CPU.

1. A post tells that a person did something to a thing at a place, and asks a question. All words
   come from small closed lists, and a post names one person, thing and place only, so that a model
   trained from nothing learns to copy them within a few hundred steps.
2. A summary is written with a random mixture of flaws (wrong person, wrong thing, vague, no
   question, filler, rambling), so that a model trained on summaries imitates the mixture.
3. `latent_utility` grades a summary; the human-like choice between two summaries of a post is drawn
   from the Bradley-Terry model of the utilities: P(first) = sigmoid(u_1 - u_2).
"""

import math
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from copg_jax.data.formats.tldr import Post, format_prompt, parse_prompt
from copg_jax.errors import InputError
from experiments.generated.writing import Row, Task

PEOPLE = ["brother", "sister", "friend", "boss", "neighbor", "cousin"]
THINGS = ["car", "bike", "dog", "phone", "guitar", "lamp"]
PLACES = ["office", "park", "kitchen", "beach", "school", "garage"]
EVENTS = ["broke", "lost", "sold", "hid", "stole", "painted"]
FEELINGS = ["angry", "sad", "tired", "confused"]
TIMES = ("yesterday", "today", "last week", "last night")
ASKS = ("should I say it?", "should I let it go?", "should I ask for money?", "should I move out?")
SUBREDDITS = ["relationships", "AskReddit", "tifu", "advice"]
FILLERS = ("so basically", "long story short", "you know", "i guess")
RAMBLING = "it was a long day and i was there and it was bad"

# Share of summaries with each flaw drawn first; a flawed one gets a second flaw three times in ten.
FLAWS = {
    "none": 0.35,
    "wrong person": 0.1,
    "wrong thing": 0.13,
    "vague": 0.12,
    "no question": 0.1,
    "filler": 0.12,
    "rambling": 0.08,
}
_SECOND_FLAW = 0.3
_COMPARISONS_PER_POST = 2
_WORDS_FOR_FREE = 16


class Facts(NamedTuple):
    """What a post is about: the words that a good summary repeats."""

    person: str
    event: str
    thing: str
    place: str
    ask: str


def latent_utility(post: Post, summary: str) -> float:
    """Grades a summary: u = 1.5 (person + thing + question) + 0.5 (event + place) - penalties.

    Each fact counts once if the summary names the post's own. Penalties are 1.5 for each person or
    thing that the event is not about and for each filler phrase, and 0.2 per word over 16.

    Args:
        post: a generated post; its facts are read from title and text.
        summary: any text.

    Returns:
        Utility in nats of the Bradley-Terry model, about -3 to 5.5.
    """
    facts = facts_of(post)
    text = summary.lower()
    words = re.findall(r"[a-z]+", text)
    present = set(words)
    wrong = (present & set(PEOPLE)) - {facts.person} | (present & set(THINGS)) - {facts.thing}
    fillers = sum(text.count(phrase) for phrase in FILLERS)
    return (
        1.5 * ((facts.person in present) + (facts.thing in present) + (facts.ask.lower() in text))
        + 0.5 * ((facts.event in present) + (facts.place in present))
        - 1.5 * (len(wrong) + fillers)
        - 0.2 * max(0, len(words) - _WORDS_FOR_FREE)
    )


def latent_reward(
    prompts: Sequence[str], completions: Sequence[str], **columns: Any
) -> list[float | None]:
    """Reward function: the latent utility, which learned rewards can be checked against.

    Raises:
        InputError: a prompt that is not a generated post.
    """
    rewards: list[float | None] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        post = parse_prompt(prompt)
        if post is None:
            raise InputError(
                f"latent_reward grades generated posts only, got prompt {prompt!r:.80}."
            )
        rewards.append(latent_utility(post, completion))
    return rewards


def facts_of(post: Post) -> Facts:
    """Reads the facts back from a generated post.

    Raises:
        InputError: the post is not a generated one.
    """
    title = post.title.lower().split()
    try:
        return Facts(
            person=next(word for word in title if word in PEOPLE),
            event=next(word for word in title if word in EVENTS),
            thing=next(word for word in title if word in THINGS),
            place=next(word for word in re.findall(r"[a-z]+", post.post) if word in PLACES),
            ask=next(ask for ask in ASKS if ask in post.post),
        )
    except StopIteration:
        raise InputError(
            f"latent_utility grades generated posts only, got a post titled {post.title!r:.80}."
        ) from None


def make_post(rng: random.Random) -> Post:
    """Draws a post of about 50 words that names each of its facts two or three times."""
    person, thing, place = rng.choice(PEOPLE), rng.choice(THINGS), rng.choice(PLACES)
    event, feeling = rng.choice(EVENTS), rng.choice(FEELINGS)
    sentences = [
        f"I was at the {place} with my {person} {rng.choice(TIMES)}.",
        f"Then my {person} {event} my {thing}.",
        rng.choice(("The {} was full of people.", "No one at the {} was there.")).format(place),
        f"It was my only {thing} and I feel {feeling}.",
        f"Now I do not know what to do, {rng.choice(ASKS)}",
    ]
    text = sentences[0] + "".join(rng.choice((" ", "\n")) + line for line in sentences[1:])
    return Post(rng.choice(SUBREDDITS), f"My {person} {event} my {thing}", text)


def make_summary(rng: random.Random, post: Post) -> str:
    """Draws a summary of a post from the mixture of flaws."""
    names, weights = zip(*FLAWS.items(), strict=True)
    flaws = set(rng.choices(names, weights))
    if "none" not in flaws and rng.random() < _SECOND_FLAW:
        flaws.update(rng.choices(names[1:], weights[1:]))
    facts = facts_of(post)
    person, thing = facts.person, facts.thing
    if "wrong person" in flaws:
        person = rng.choice([word for word in PEOPLE if word != person])
    if "wrong thing" in flaws:
        thing = rng.choice([word for word in THINGS if word != thing])
    text = f"my {person} {facts.event} my {thing} at the {facts.place}"
    if "vague" in flaws:
        text = f"my {person} was not so good"
    if "filler" in flaws:
        phrase = rng.choice(FILLERS)
        text = rng.choice((f"{phrase} {text}", f"{text} {phrase}", f"{phrase} {text} {phrase}"))
    if "rambling" in flaws:
        text = f"{text} and {RAMBLING}"
    return text + ("." if "no question" in flaws else f", {facts.ask}")


def _posts(count: int, rng: random.Random) -> Iterator[Row]:
    for index in range(count):
        post = make_post(rng)
        yield {"id": f"s{index}", **post._asdict(), "summary": make_summary(rng, post)}


def _comparisons(count: int, rng: random.Random) -> Iterator[Row]:
    post = make_post(rng)
    for index in range(count):
        if index % _COMPARISONS_PER_POST == 0:
            post = make_post(rng)
        first = second = make_summary(rng, post)
        while second == first:
            second = make_summary(rng, post)
        gap = latent_utility(post, first) - latent_utility(post, second)
        yield {
            "info": {"id": f"c{index // _COMPARISONS_PER_POST}", **post._asdict()},
            "summaries": [
                {"text": f" {text}", "policy": "generated", "note": None}
                for text in (first, second)
            ],
            "choice": int(rng.random() >= 1 / (1 + math.exp(-gap))),
            "worker": "generated",
            "batch": "generated",
            "split": "train",
            "extra": {"confidence": None},
        }


def _text(row: Row) -> str:
    return f"{format_prompt(Post(*(row[name] for name in Post._fields)))} {row['summary']}"


POSTS = Task(_posts, _comparisons, _text)

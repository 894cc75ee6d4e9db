"""Made-up dialogues of four turns, and which of two last turns people prefer.

1. A user tells their name and where they saw a thing at what price, and asks for one of these in
   their second turn. Rows are messages: `prompt` with `completion`, or `chosen` and `rejected`.
2. Replies are written with a random mixture of flaws (a wrong fact, no answer, no name, rude, the
   question repeated, no offer of help), so that a model trained on them has as many.
3. `reply_utility` grades a reply; which of two is chosen is drawn from the Bradley-Terry model of
   the utilities: P(first) = sigmoid(u_1 - u_2).
"""

import math
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from experiments.generated.writing import Row, Task

NAMES = ("Anna", "Ben", "Carl", "Dora", "Emil", "Frida", "Gina", "Hugo")
THINGS = ("bike", "lamp", "guitar", "coat", "sofa", "phone")
SHOPS = ("market", "station", "museum", "harbor", "library", "bakery")
PRICES = tuple(range(10, 100, 10))
QUESTIONS = {
    "shop": ("Where did I see it?", "Where was it again?"),
    "price": ("How much was it?", "What did it cost?"),
}
RUDE = ("That is obvious.", "What a silly question.")
OFFER = "Can I help you with anything else?"

MARKS = ("<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Share of replies with each flaw drawn first; a flawed one gets a second flaw three times in ten.
FLAWS = {
    "none": 0.35,
    "wrong fact": 0.2,
    "no answer": 0.1,
    "no name": 0.1,
    "rude": 0.1,
    "no offer": 0.15,
}
_SECOND_FLAW = 0.3


class Talk(NamedTuple):
    """What a dialogue is about, and the turn that is asked for."""

    name: str
    thing: str
    shop: str
    price: int
    asked: str  # "shop" or "price"
    prompt: list[dict[str, str]]


def make_talk(rng: random.Random) -> Talk:
    """Draws a dialogue of a user's two turns and the reply between them."""
    name, thing, shop = rng.choice(NAMES), rng.choice(THINGS), rng.choice(SHOPS)
    price, asked = rng.choice(PRICES), rng.choice(list(QUESTIONS))
    facts = [f"I saw a {thing} at the {shop}", f"it was {price} coins"]
    turns = [
        f"Hello, I am {name}. {facts[0]} and {facts[1]}.",
        f"Nice to meet you, {name}!",
        rng.choice(QUESTIONS[asked]),
    ]
    roles = ("user", "assistant", "user")
    prompt = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    return Talk(name, thing, shop, price, asked, prompt)


def make_reply(rng: random.Random, talk: Talk) -> str:
    """Draws a reply from the mixture of flaws."""
    names, weights = zip(*FLAWS.items(), strict=True)
    flaws = set(rng.choices(names, weights))
    if "none" not in flaws and rng.random() < _SECOND_FLAW:
        flaws.update(rng.choices(names[1:], weights[1:]))
    shop, price = talk.shop, talk.price
    if "wrong fact" in flaws:
        shop = rng.choice([word for word in SHOPS if word != shop])
        price = rng.choice([number for number in PRICES if number != price])
    text = f"The {talk.thing} was " + (
        f"at the {shop}" if talk.asked == "shop" else f"{price} coins"
    )
    if "no answer" in flaws:
        text = "I do not know"
    text += "." if "no name" in flaws else f", {talk.name}."
    if "rude" in flaws:
        text = f"{rng.choice(RUDE)} {text}"
    return text if "no offer" in flaws else f"{text} {OFFER}"


def reply_utility(talk: Talk, reply: str) -> float:
    """Grades a reply: u = 3 right - 2 wrong + name + offer - 2 rude.

    `right` and `wrong` say whether the fact that was asked for is in it, and another one.

    Returns:
        Utility in nats of the Bradley-Terry model, from -4 to 5.
    """
    words = set(re.findall(r"\w+", reply))
    facts = set(SHOPS) if talk.asked == "shop" else set(map(str, PRICES))
    right = str(talk.shop if talk.asked == "shop" else talk.price)
    return (
        3.0 * (right in words)
        - 2.0 * bool((words & facts) - {right})
        + 1.0 * (talk.name in words)
        + 1.0 * (OFFER in reply)
        - 2.0 * any(text in reply for text in RUDE)
    )


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _examples(count: int, rng: random.Random) -> Iterator[Row]:
    for index in range(count):
        talk = make_talk(rng)
        reply = make_reply(rng, talk)
        yield {"id": f"e{index}", "prompt": talk.prompt, "completion": _turn(reply)}


def _comparisons(count: int, rng: random.Random) -> Iterator[Row]:
    for index in range(count):
        talk = make_talk(rng)
        first = second = make_reply(rng, talk)
        while second == first:
            second = make_reply(rng, talk)
        gap = reply_utility(talk, first) - reply_utility(talk, second)
        if rng.random() >= 1 / (1 + math.exp(-gap)):
            first, second = second, first
        yield {
            "id": f"c{index}",
            "prompt": talk.prompt,
            "chosen": _turn(first),
            "rejected": _turn(second),
        }


def _text(row: Row) -> str:
    return "\n".join(message["content"] for message in [*row["prompt"], *row["completion"]])


DIALOGUE = Task(_examples, _comparisons, _text, TEMPLATE, MARKS)

"""A row as text: `TextGroup`, one prompt with K completions, and what a format of text is.

A text is a string or, of the format `chat`, a list of messages: `content` is what such an answer
says, `stored_text` how files keep both.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from copg_jax.data.chat_template import Messages
from copg_jax.data.formats.engine import EngineOutput
from copg_jax.data.tokenizer import Encoder

Text = str | Messages


def content(text: Text) -> str:
    """What a text says; of messages, what the last one does."""
    return text if isinstance(text, str) else text[-1]["content"]


def stored_text(text: Text) -> str:
    """A text as files keep it: messages as JSON."""
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)


def given_text(stored: str, format: str) -> Text:
    """The text that `stored_text` was made of, in the format of this name."""
    return json.loads(stored) if format == "chat" else stored


@dataclass(frozen=True)
class TextGroup:
    """One prompt with K completions as text; `where` is the `file:line` it came from.

    `rewards` has one entry per completion; None marks a completion to leave out. `chosen` is the
    index of the completion that is preferred, where a row says so; `is_choice`: the rewards, 1 and
    0, are that choice alone, and no scores. `is_framed`: the row has the fields of a post and no
    prompt of its own. `format` names the format that its texts are in. `engine`: what an inference
    engine that wrote the completions says of them. `num_left_out`: completions of the row that are
    not here, since its prompt alone is wanted.
    """

    id: str
    where: str
    prompt: Text
    completions: tuple[Text, ...]
    rewards: tuple[float | None, ...] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    chosen: int | None = None
    is_choice: bool = False
    is_framed: bool = False
    format: str = "text"
    engine: EngineOutput | None = None
    num_left_out: int = 0


class Written(NamedTuple):
    """What a model reads of a group: the text of its prompt, those of its completions without their
    end, and what encodes such texts.
    """

    encoder: Encoder
    prompt: str
    completions: tuple[str, ...]


class TextFormat(Protocol):
    """The conventions by which the texts of a row become those that a model reads."""

    name: str

    @property
    def hash(self) -> str:
        """Hash of the conventions: where a row gets another text, it is another."""
        ...

    def recognises(self, group: TextGroup) -> bool:
        """Whether the texts of a row, as they are given, can be in this format."""
        ...

    def render(self, group: TextGroup) -> TextGroup | str:
        """The group in this format, or the reason why its row is left out."""
        ...

    def write(self, group: TextGroup, encoder: Encoder) -> Written:
        """What a model with this tokenizer reads of a group in this format: its texts as they
        are, unless the format says otherwise.
        """
        assert isinstance(group.prompt, str)
        return Written(encoder, group.prompt, tuple(map(content, group.completions)))

    def cut(
        self, prompt: str, token_ends: Callable[[str], Sequence[int]], max_tokens: int
    ) -> str | None:
        """A prompt that is too long, cut to the limit; None where it cannot be."""
        ...

    def answer(self, text: str) -> Text:
        """The completion that a generated text is: itself, unless the format says otherwise."""
        return text

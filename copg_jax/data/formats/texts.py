"""A row as text: `TextGroup`, one prompt with K completions, and what a format of text is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class TextGroup:
    """One prompt with K completions as text; `where` is the `file:line` it came from.

    `rewards` has one entry per completion; None marks a completion to leave out. `chosen` is the
    index of the completion that is preferred, where a row says so; `is_choice`: the rewards, 1 and
    0, are that choice alone, and no scores. `is_framed`: the row has the fields of a post and no
    prompt of its own. `format` names the format that its texts are in.
    """

    id: str
    where: str
    prompt: str
    completions: tuple[str, ...]
    rewards: tuple[float | None, ...] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    chosen: int | None = None
    is_choice: bool = False
    is_framed: bool = False
    format: str = "text"


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

    def cut(
        self, prompt: str, token_ends: Callable[[str], Sequence[int]], max_tokens: int
    ) -> str | None:
        """A prompt that is too long, cut to the limit; None where it cannot be."""
        ...

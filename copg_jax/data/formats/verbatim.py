"""The format `text`: prompt and completion as they are given, byte for byte."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from copg_jax.data.formats.texts import TextFormat, TextGroup

VERSION = 1  # counted up with every change by which a row gets another text


class Verbatim(TextFormat):
    """Any text; nothing says where a prompt could be cut."""

    name = "text"

    @property
    def hash(self) -> str:
        """See `TextFormat`."""
        return hashlib.sha256(repr((self.name, VERSION)).encode()).hexdigest()[:16]

    def recognises(self, group: TextGroup) -> bool:
        """Every prompt that a row has, if it is no list of messages."""
        return isinstance(group.prompt, str) and not group.is_framed

    def render(self, group: TextGroup) -> TextGroup:
        """The same texts."""
        return replace(group, format=self.name)

    def cut(self, prompt: str, token_ends: Callable[[str], Sequence[int]], max_tokens: int) -> None:
        """Never: see `TextFormat`."""

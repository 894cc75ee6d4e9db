"""The format `chat`: messages, which the tokenizer's own chat template makes a text of."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from copg_jax.data.chat_template import Messages
from copg_jax.data.formats.texts import TextFormat, TextGroup, Written
from copg_jax.data.rows import InvalidRow
from copg_jax.data.tokenizer import Encoder
from copg_jax.errors import InputError

VERSION = 1  # counted up with every change by which a row gets another text


class Chat(TextFormat):
    """Conversations; a prompt is never cut, since any turn of it may matter."""

    name = "chat"

    @property
    def hash(self) -> str:
        """See `TextFormat`; the template has a hash of its own."""
        return hashlib.sha256(repr((self.name, VERSION)).encode()).hexdigest()[:16]

    def recognises(self, group: TextGroup) -> bool:
        """Messages, and no text."""
        return isinstance(group.prompt, list)

    def render(self, group: TextGroup) -> TextGroup:
        """The same messages."""
        return replace(group, format=self.name)

    def write(self, group: TextGroup, encoder: Encoder) -> Written:
        """The prompt with what the template writes in front of an answer, and the answers.

        Raises:
            InputError: the tokenizer has no template, or none that ends a turn.
            InvalidRow: the template refuses the messages, or is not prefix-preserving for them.
        """
        template, turns = encoder.template, encoder.of_turns
        prompt, answers = cast(Messages, group.prompt), cast(list[Messages], group.completions)
        assert template is not None  # else there are no `of_turns`
        try:
            text, texts = template.split(prompt, answers)
        except InputError as error:
            raise InvalidRow(group.where, "chat template", f"{error}.") from error
        return Written(turns, text, tuple(texts))

    def cut(self, prompt: str, token_ends: Callable[[str], Sequence[int]], max_tokens: int) -> None:
        """Never: see `TextFormat`."""

    def answer(self, text: str) -> Messages:
        """The message of a text that was generated."""
        return [{"role": "assistant", "content": text}]

"""A tokenizer's own chat template: messages as the text that the model was trained on.

`transformers` renders it in a Jinja sandbox: a template is data, and no code of it is run.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from copg_jax.errors import InputError

Messages = list[dict[str, Any]]

_ASKED = {"role": "user", "content": "a question"}
_ANSWER = "the answer"
_BEFORE, _SHOWN = 60, 240  # characters of a rendering, around where two of them part


class TurnEnd(NamedTuple):
    """What a template writes behind the text of an assistant's turn."""

    id: int  # of the token that ends it
    token: str
    behind: str  # what follows the token, often a newline; a model never writes it


class ChatTemplate:
    """The template of a tokenizer.

    Args:
        tokenizer: has a template.
        name: of the tokenizer, for messages.

    Attributes:
        hash: of the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        source = json.dumps(tokenizer.chat_template, sort_keys=True)
        self.hash = hashlib.sha256(source.encode()).hexdigest()[:16]

    def render(self, messages: Messages, *, for_answer: bool = False) -> str:
        """The text of messages; `for_answer`: with what comes in front of the next answer.

        Raises:
            InputError: the template refuses them, or fails at them.
        """
        from jinja2 import TemplateError  # by which transformers renders; texts need none of it

        try:
            text: Any = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=for_answer
            )
        except TemplateError as error:
            raise InputError(
                f"the chat template of {self._name} refuses these messages: {error}"
            ) from error
        except Exception as error:  # an expression of the template, on values it did not expect
            raise InputError(
                f"the chat template of {self._name} fails at these messages "
                f"({type(error).__name__}: {error})"
            ) from error
        return text

    def split(self, prompt: Messages, answers: Sequence[Messages]) -> tuple[str, list[str]]:
        """The text of a prompt, and those of its answers, each up to and without the end of its
        turn.

        Raises:
            InputError: the prompt is written in another way where an answer follows, so that no
                text is the answer's own; or an answer is not ended as others are.
        """
        before = self.render(prompt, for_answer=True)
        return before, [self._answer(before, [*prompt, *answer]) for answer in answers]

    def _answer(self, before: str, messages: Messages) -> str:
        text, end = self._behind(before, self.render(messages)), self.turn_end
        if not text.endswith(end.token + end.behind):
            raise InputError(
                f"the chat template of {self._name} ends this answer in {text[-40:]!r}, and others "
                f"in {end.token + end.behind!r}: wanted one end of all"
            )
        return text.removesuffix(end.token + end.behind)

    @cached_property
    def turn_end(self) -> TurnEnd:
        """What ends an assistant's turn: the first special token behind the text of one.

        Raises:
            InputError: it cannot be found.
        """
        before = self.render([_ASKED], for_answer=True)
        whole = self.render([_ASKED, {"role": "assistant", "content": _ANSWER}])
        _, _, behind = self._behind(before, whole).rpartition(_ANSWER)
        ids = {
            str(token): index
            for index, token in self._tokenizer.added_tokens_decoder.items()
            if str(token).strip()
        }
        longest_first = sorted(ids, key=len, reverse=True)
        match = re.search("|".join(map(re.escape, longest_first)), behind) if ids else None
        if match is None:
            raise InputError(
                f"{self._name}: wanted a chat template that ends an assistant's turn in a special "
                f"token, got {behind!r} behind its text. Fix: let the template write the end token "
                "there, such as {{ eos_token }}."
            )
        return TurnEnd(ids[match.group()], match.group(), behind[match.end() :])

    def _behind(self, before: str, whole: str) -> str:
        if whole.startswith(before):
            return whole[len(before) :]
        raise InputError(
            f"the chat template of {self._name} is not prefix-preserving: what it writes for the "
            "prompt, with the beginning of an answer, is not how it begins the prompt with the "
            f"answer:\n    prompt: {_around(before, whole)}\n    whole:  {_around(whole, before)}\n"
            "Fix: a template whose add_generation_prompt writes what its turns begin with"
        )


def _around(text: str, other: str) -> str:
    """A rendering from a little before where it parts from another one."""
    pairs = zip(text, other, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))
    first = max(0, same - _BEFORE)
    shown = text[first : first + _SHOWN]
    return f"{'…' * (first > 0)}{shown!r}{'…' * (first + _SHOWN < len(text))}"

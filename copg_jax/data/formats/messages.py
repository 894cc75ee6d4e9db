"""Messages of a conversation, as rows have them: TRL's, an object with `role` and `content` each.

1. `read_messages` checks those of a field.
2. `split_answer` takes the last turn off a conversation; `split_pair` finds the prompt that two
   conversations have in common.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from copg_jax.data.chat_template import Messages
from copg_jax.data.rows import InvalidRow

ROLES = ("system", "user", "assistant")
_OF_TOOLS = ("tool", "function", "ipython")
_NO_TOOLS = "which are not supported: wanted turns of system, user and assistant alone."


def read_messages(where: str, name: str, value: list[Any]) -> Messages:
    """The messages of a field, without what is null in them.

    Raises:
        InvalidRow: none, or one without role or text, of an unknown role, or of tools.
    """
    if not value:
        raise InvalidRow(where, "no messages", f"field '{name}' is an empty list.")
    return [_message(where, f"{name}[{index}]", message) for index, message in enumerate(value)]


def _message(where: str, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRow(
            where,
            "wrong type",
            f"field '{name}': wanted a message, an object with role and content, got "
            f"{type(value).__name__} ({value!r:.60}).",
        )
    # Columns of Parquet have every field in every message.
    message = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if role in _OF_TOOLS or message.get("tool_calls"):
        raise InvalidRow(where, "tools", f"field '{name}' is of tools, {_NO_TOOLS}")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise InvalidRow(
                where,
                f"message without {key}",
                f"field '{name}.{key}': wanted a string, got {message.get(key)!r:.60}. Parts such "
                "as images are not supported.",
            )
    if role not in ROLES:
        raise InvalidRow(
            where,
            "unknown role",
            f"field '{name}.role' is {role!r:.60}: wanted one of {', '.join(ROLES)}.",
        )
    return message


def refuse_options(where: str, row: Mapping[str, Any]) -> None:
    """Raises InvalidRow where a row of messages has columns that TRL gives to the template."""
    options = "which are not read: a template gets the messages alone."
    for name, why in (("tools", _NO_TOOLS), ("chat_template_kwargs", options)):
        if row.get(name):
            raise InvalidRow(where, name, f"field '{name}' has values, {why}")


def split_answer(where: str, name: str, messages: Messages) -> tuple[Messages, Messages]:
    """A conversation as its prompt and its last turn.

    Raises:
        InvalidRow: that is no answer to a prompt.
    """
    if messages[-1]["role"] != "assistant":
        raise InvalidRow(
            where,
            "no answer",
            f"field '{name}' ends in a turn of {messages[-1]['role']!r}: wanted a last turn of the "
            "assistant, which is learnt.",
        )
    if len(messages) == 1:
        detail = f"field '{name}' has no turn in front of the answer."
        raise InvalidRow(where, "empty prompt", detail)
    return messages[:-1], messages[-1:]


def split_pair(where: str, pair: tuple[Messages, Messages]) -> tuple[Messages, Messages, Messages]:
    """The prompt that both conversations of a pair have in common, and the answer of each.

    Raises:
        InvalidRow: they differ before their last turn.
    """
    (prompt, chosen), (other, rejected) = (
        split_answer(where, name, messages)
        for name, messages in zip(("chosen", "rejected"), pair, strict=True)
    )
    if prompt != other:
        parted = [a == b for a, b in zip(prompt, other, strict=False)]
        index = parted.index(False) if False in parted else len(parted)
        raise InvalidRow(
            where,
            "pair of two prompts",
            f"fields 'chosen' and 'rejected' differ at message {index}, before their last turns: "
            "wanted two answers to the same prompt.",
        )
    return prompt, chosen, rejected


def check_turns(where: str, prompt: Messages, answers: Sequence[Messages]) -> None:
    """Raises InvalidRow unless each answer is one turn of the assistant, and the prompt ends in a
    turn of somebody else.
    """
    if prompt[-1]["role"] == "assistant":
        raise InvalidRow(
            where,
            "two assistant turns at the end",
            "the prompt ends in a turn of the assistant, and an answer follows: wanted a turn of "
            "the user between them.",
        )
    for index, answer in enumerate(answers):
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            roles = [message["role"] for message in answer]
            raise InvalidRow(
                where,
                "no single answer",
                f"completion {index}: wanted one message of the assistant, got turns of {roles}.",
            )

"""Rows of every public schema, as groups of text.

1. `detect_schema` recognises a row by its field names alone.
2. `to_group` makes a `TextGroup` of it, with the texts or messages as the row has them.
3. What cannot be used raises `InvalidRow`; news articles come back as a reason to leave them out.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from copg_jax.config.schema import FLOAT32_MAX
from copg_jax.data.chat_template import Messages
from copg_jax.data.formats.engine import ENGINE_FIELDS, read_engine
from copg_jax.data.formats.messages import (
    check_turns,
    read_messages,
    refuse_options,
    split_answer,
    split_pair,
)
from copg_jax.data.formats.texts import Text, TextGroup, content
from copg_jax.data.formats.tldr import NEWS, Post, format_prompt
from copg_jax.data.formats.values import check_values
from copg_jax.data.rows import InvalidRow, Row

PAIR_SCORES = ("score_{}", "{}_score", "reward_{}", "{}_reward")
"""Names of the scores of a pair, "chosen" or "rejected" in the braces; they are its rewards."""


def to_group(where: str, row: Row) -> TextGroup | str:
    """Makes a group of one row of any known schema, or returns the reason why it is left out.

    Raises:
        InvalidRow: unknown schema, missing or mistyped field, no prompt, number that is not finite,
            or what no file could hold.
    """
    check_values(where, row)
    group = detect_schema(where, row).make(where, row)
    return group if isinstance(group, str) else _with_prompt(where, group)


def _with_prompt(where: str, group: TextGroup) -> TextGroup:
    """Raises InvalidRow where a group has no text in its prompt."""
    if isinstance(group.prompt, str) and not group.prompt.strip():
        raise InvalidRow(where, "empty prompt", "field 'prompt' is empty.")
    return group


def to_prompt(where: str, row: Row) -> TextGroup | str:
    """The same without its completions; a row may have none, and a `prompt` alone.

    Raises:
        InvalidRow: as `to_group`, and for a row without a prompt.
    """
    is_known = any(all(name in row for name in schema.fields) for schema in SCHEMAS)
    if not is_known and "prompt" not in row:
        raise InvalidRow(
            where,
            "no prompt",
            f"wanted a `prompt`, or a row as it is trained on; got {sorted(row)}. data.columns "
            "reads it from a field of another name.",
        )
    if is_known:
        group = to_group(where, row)
        if isinstance(group, str):
            return group
        nothing = {"rewards": None, "chosen": None, "is_choice": False, "engine": None}
        return replace(group, completions=(), num_left_out=len(group.completions), **nothing)
    check_values(where, row)
    return _with_prompt(where, _prompt_row(where, row, (), None, used=("prompt",)))


class Schema(NamedTuple):
    """A known row format: its name, the fields that identify it and the function that reads it."""

    name: str
    fields: tuple[str, ...]
    make: Callable[[str, Row], TextGroup | str]


def detect_schema(where: str, keys: Collection[str]) -> Schema:
    """Returns the first known schema whose identifying fields are all among `keys`.

    Raises:
        InvalidRow: no schema fits; names the missing fields of the nearest one and lists all.
    """
    for schema in SCHEMAS:
        if all(name in keys for name in schema.fields):
            return schema
    if "prompt" in keys and not any(name in keys for name in _ANSWERS):
        raise InvalidRow(
            where,
            "no completion",
            f"the row has a prompt and no completion; got {sorted(keys)}. Give `completion`, or "
            "`chosen` and `rejected`, or `completions` with `rewards`; data.columns reads them "
            "from fields of other names.",
        )
    nearest = max(SCHEMAS, key=lambda s: sum(name in keys for name in s.fields) / len(s.fields))
    missing = [name for name in nearest.fields if name not in keys]
    known = "; ".join(f"{schema.name}: {', '.join(schema.fields)}" for schema in SCHEMAS)
    raise InvalidRow(
        where,
        "missing field",
        f"fields {missing} are missing for the nearest schema ({nearest.name}); got "
        f"{sorted(keys)}. Known schemas: {known}.",
    )


_ANSWERS = ("completion", "completions", "chosen", "rejected", "label")


def _post_row(where: str, row: Row) -> TextGroup:
    post = Post(*(_text(where, row, name) for name in Post._fields))
    summary = _text(where, row, "summary")
    columns = {"reference": summary, "subreddit": post.subreddit, "title": post.title}
    return TextGroup(
        _id(where, row),
        where,
        format_prompt(post),
        (summary,),
        columns=columns,
        is_framed=True,
    )


def _comparison_row(where: str, row: Row) -> TextGroup | str:
    info = _typed(where, row, "info", dict)
    if info.get("article") or not ("post" in info or "subreddit" in info):
        return NEWS
    post = Post(*(_text(where, info, name, "info.") for name in Post._fields))
    texts = []
    for index, summary in enumerate(_typed(where, row, "summaries", list)):
        if not isinstance(summary, dict):
            raise _type_error(where, f"summaries[{index}]", "an object", summary)
        texts.append(_text(where, summary, "text", f"summaries[{index}]."))
    choice = row["choice"]
    if len(texts) != 2 or isinstance(choice, bool) or choice not in (0, 1):
        raise InvalidRow(
            where,
            "bad choice",
            f"wanted 2 summaries and choice 0 or 1, got {len(texts)} and choice {choice!r}.",
        )
    rewards = (1.0 - choice, float(choice))
    columns = {"subreddit": post.subreddit, "title": post.title}
    return TextGroup(
        _id(where, info),
        where,
        format_prompt(post),
        tuple(texts),
        rewards,
        columns,
        chosen=int(choice),
        is_choice=True,
        is_framed=True,
    )


def _pair_row(where: str, row: Row) -> TextGroup:
    chosen, rejected = (_said(where, row, name) for name in ("chosen", "rejected"))
    written = row.get("prompt")
    if not (isinstance(written, list) or isinstance(chosen, str) or isinstance(rejected, str)):
        row = row | {"prompt": _shared_prompt(where, written, (chosen, rejected))}
    texts = chosen, rejected
    kinds = [[form.format(side) for side in ("chosen", "rejected")] for form in PAIR_SCORES]
    nulls = [names for names in kinds if all(name in row for name in names)]
    kinds = [names for names in kinds if any(row.get(name) is not None for name in names)]
    if len(kinds) + (row.get("rewards") is not None) > 1:
        found = [name for names in (*kinds, ["rewards"]) for name in names if name in row]
        detail = f"fields {found}: wanted the scores of a pair once."
        raise InvalidRow(where, "scores more than once", detail)
    # Nulls alone are scores too: those of a pair that was given none.
    used_names = (kinds or nulls)[:1]
    scores = {name: _typed(where, row, name, object) for names in used_names for name in names}
    rewards = _rewards(where, row, len(texts)) or _numbers(where, scores)
    used = ("prompt", "chosen", "rejected", "rewards")
    group = _prompt_row(where, row, texts, rewards or (1.0, 0.0), used=used)
    return replace(group, chosen=0, is_choice=not rewards)


def _completion_row(name: str) -> Callable[[str, Row], TextGroup]:
    def make(where: str, row: Row) -> TextGroup:
        text = _said(where, row, name)
        row = {**row, "reference": row.get("reference", content(text))}
        return _prompt_row(where, row, (text,), None, used=("prompt", name))

    return make


def _conversation_row(where: str, row: Row) -> TextGroup:
    messages = read_messages(where, "messages", _typed(where, row, "messages", list))
    prompt, answer = split_answer(where, "messages", messages)
    row = {name: value for name, value in row.items() if name != "messages"}
    row |= {"prompt": prompt, "completion": answer}
    return _completion_row("completion")(where, row)


def _shared_prompt(where: str, written: Any, pair: tuple[Messages, Messages]) -> Messages:
    """The messages that both conversations of a pair begin with; a prompt that is given as a text
    has to be what one of them says.
    """
    prompt, _, _ = split_pair(where, pair)
    said = [message["content"] for message in prompt]
    if written is not None and written not in said:
        raise InvalidRow(
            where,
            "two prompts",
            f"field 'prompt' is {written!r:.60}, which none of the messages says that 'chosen' and "
            "'rejected' begin with: wanted one prompt.",
        )
    return prompt


def _group_row(where: str, row: Row) -> TextGroup:
    given = _typed(where, row, "completions", list)
    texts = tuple(_read(where, f"completions[{k}]", text) for k, text in enumerate(given))
    if not texts:
        raise InvalidRow(
            where,
            "empty completion",
            "field 'completions' is an empty list: wanted at least one text.",
        )
    rewards = _rewards(where, row, len(texts))
    engine = read_engine(where, row, len(texts))
    used = ("prompt", "completions", "rewards", *(ENGINE_FIELDS if engine else ()))
    return replace(_prompt_row(where, row, texts, rewards, used=used), engine=engine)


def _prompt_row(
    where: str,
    row: Row,
    texts: tuple[Text, ...],
    rewards: tuple[float | None, ...] | None,
    *,
    used: Collection[str],
) -> TextGroup:
    """Shared end of the schemas with a ready-made prompt; fields not `used` become columns."""
    prompt = _said(where, row, "prompt")
    texts = tuple(_behind(prompt, text) for text in texts)
    kinds = {type(text) for text in (prompt, *texts)}
    if len(kinds) > 1:
        raise InvalidRow(
            where,
            "texts and messages",
            f"field 'prompt' is a {_kind(prompt)}, and what answers it a "
            f"{' or '.join(sorted({_kind(text) for text in texts}))}: wanted messages in both, or "
            "texts in both.",
        )
    if isinstance(prompt, list):
        refuse_options(where, row)
        check_turns(where, prompt, [text for text in texts if isinstance(text, list)])
    columns = {name: value for name, value in row.items() if name not in used and name != "id"}
    return TextGroup(_id(where, row), where, prompt, texts, rewards, columns)


def _behind(prompt: Text, text: Text) -> Text:
    """An answer in messages without the prompt, where it is a whole conversation."""
    if isinstance(prompt, list) and isinstance(text, list) and text[: len(prompt)] == prompt:
        return text[len(prompt) :] or text
    return text


def _kind(text: Text) -> str:
    return "text" if isinstance(text, str) else "list of messages"


# First match wins: those with more, and more particular, fields come first.
SCHEMAS = (
    Schema("OpenAI comparisons", ("info", "summaries", "choice"), _comparison_row),
    Schema("OpenAI TL;DR posts", ("subreddit", "title", "post", "summary"), _post_row),
    Schema("k-way groups (rewards optional)", ("prompt", "completions"), _group_row),
    Schema("preference pairs", ("prompt", "chosen", "rejected"), _pair_row),
    Schema("prompt and completion", ("prompt", "completion"), _completion_row("completion")),
    Schema("prompt and label (CarperAI)", ("prompt", "label"), _completion_row("label")),
    Schema("pairs of conversations", ("chosen", "rejected"), _pair_row),
    Schema("conversations", ("messages",), _conversation_row),
)


def _id(where: str, row: Row) -> str:
    """The row's own id, else where it stands: file name and line."""
    return str(row["id"]) if row.get("id") is not None else where.rsplit("/", 1)[-1]


def _said(where: str, row: Row, name: str) -> Text:
    """A field with a text, or with messages."""
    return _read(where, name, _typed(where, row, name, object))


def _read(where: str, name: str, value: Any) -> Text:
    if isinstance(value, list):
        return read_messages(where, name, value)
    if not isinstance(value, str):
        raise _type_error(where, name, "a string or messages", value)
    return value


def _text(where: str, row: Row, name: str, parent: str = "") -> str:
    return _typed(where, row, name, str, parent)


def _typed(where: str, row: Row, name: str, kind: type, parent: str = "") -> Any:
    if name not in row:
        raise InvalidRow(
            where, "missing field", f"field '{parent}{name}' is missing; got {sorted(row)}."
        )
    if not isinstance(row[name], kind):
        wanted = {str: "a string", list: "a list", dict: "an object"}[kind]
        raise _type_error(where, parent + name, wanted, row[name])
    return row[name]


def _rewards(where: str, row: Row, count: int) -> tuple[float | None, ...] | None:
    """Reads one finite number or None per completion."""
    if row.get("rewards") is None:
        return None
    values = _typed(where, row, "rewards", list)
    if len(values) != count:
        raise InvalidRow(
            where,
            "rewards count",
            f"field 'rewards' has {len(values)} entries for {count} completions: wanted one each.",
        )
    return _numbers(where, {f"rewards[{index}]": value for index, value in enumerate(values)})


def _numbers(where: str, values: Mapping[str, Any]) -> tuple[float | None, ...]:
    """Checks numbers by the names of their fields: each finite in float32, or None."""
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _type_error(where, name, "a number or null", value)
        if not abs(value) <= FLOAT32_MAX:
            raise InvalidRow(
                where,
                "non-finite rewards",
                f"field '{name}' is {value!r:.40}: wanted a finite number of float32, or null.",
            )
    return tuple(values.values())


def _type_error(where: str, name: str, wanted: str, got: Any) -> InvalidRow:
    return InvalidRow(
        where,
        "wrong type",
        f"field '{name}': wanted {wanted}, got {type(got).__name__} ({got!r:.60}).",
    )

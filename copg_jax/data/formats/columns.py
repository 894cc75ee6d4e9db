"""Rows of every public schema, as groups of text.

1. `detect_schema` recognises a row by its field names alone.
2. `to_group` makes a `TextGroup` of it, with the texts as the row has them.
3. What cannot be used raises `InvalidRow`; news articles come back as a reason to leave them out.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from copg_jax.config.schema import FLOAT32_MAX
from copg_jax.data.formats.texts import TextGroup
from copg_jax.data.formats.tldr import NEWS, Post, format_prompt
from copg_jax.data.rows import InvalidRow, Row

PAIR_SCORES = ("score_{}", "{}_score", "reward_{}", "{}_reward")
"""Names of the scores of a pair, "chosen" or "rejected" in the braces; they are its rewards."""


_MAX_NESTING = 100  # far above real data, far below what a library may recurse


def to_group(where: str, row: Row) -> TextGroup | str:
    """Makes a group of one row of any known schema, or returns the reason why it is left out.

    Raises:
        InvalidRow: unknown schema, missing or mistyped field, no prompt, number that is not finite,
            or what no file could hold.
    """
    _check_values(where, row)
    group = detect_schema(where, row).make(where, row)
    if isinstance(group, TextGroup) and not group.prompt.strip():
        raise InvalidRow(where, "empty prompt", "field 'prompt' is empty.")
    return group


def to_prompt(where: str, row: Row) -> TextGroup | str:
    """The same without its completions; a row may have none, and a `prompt` alone.

    Raises:
        InvalidRow: as `to_group`.
    """
    if any(all(name in row for name in schema.fields) for schema in SCHEMAS) or "prompt" not in row:
        group = to_group(where, row)
        if isinstance(group, str):
            return group
        return replace(group, completions=(), rewards=None, chosen=None, is_choice=False)
    _check_values(where, row)
    group = _prompt_row(where, row, (), None, used=("prompt",))
    if not group.prompt.strip():
        raise InvalidRow(where, "empty prompt", "field 'prompt' is empty.")
    return group


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
    nearest = max(SCHEMAS, key=lambda s: sum(name in keys for name in s.fields) / len(s.fields))
    missing = [name for name in nearest.fields if name not in keys]
    known = "; ".join(f"{schema.name}: {', '.join(schema.fields)}" for schema in SCHEMAS)
    raise InvalidRow(
        where,
        "missing field",
        f"fields {missing} are missing for the nearest schema ({nearest.name}); got "
        f"{sorted(keys)}. Known schemas: {known}.",
    )


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
    texts = tuple(_text(where, row, name) for name in ("chosen", "rejected"))
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
        text = _text(where, row, name)
        row = {**row, "reference": row.get("reference", text)}
        return _prompt_row(where, row, (text,), None, used=("prompt", name))

    return make


def _group_row(where: str, row: Row) -> TextGroup:
    texts = tuple(_typed(where, row, "completions", list))
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise _type_error(where, f"completions[{index}]", "a string", text)
    if not texts:
        raise InvalidRow(
            where,
            "empty completion",
            "field 'completions' is an empty list: wanted at least one text.",
        )
    rewards = _rewards(where, row, len(texts))
    return _prompt_row(where, row, texts, rewards, used=("prompt", "completions", "rewards"))


def _prompt_row(
    where: str,
    row: Row,
    texts: tuple[str, ...],
    rewards: tuple[float | None, ...] | None,
    *,
    used: Collection[str],
) -> TextGroup:
    """Shared end of the schemas with a ready-made prompt; fields not `used` become columns."""
    prompt = _text(where, row, "prompt")
    columns = {name: value for name, value in row.items() if name not in used and name != "id"}
    return TextGroup(_id(where, row), where, prompt, texts, rewards, columns)


# First match wins: those with more, and more particular, fields come first.
SCHEMAS = (
    Schema("OpenAI comparisons", ("info", "summaries", "choice"), _comparison_row),
    Schema("OpenAI TL;DR posts", ("subreddit", "title", "post", "summary"), _post_row),
    Schema("k-way groups (rewards optional)", ("prompt", "completions"), _group_row),
    Schema("preference pairs", ("prompt", "chosen", "rejected"), _pair_row),
    Schema("prompt and completion", ("prompt", "completion"), _completion_row("completion")),
    Schema("prompt and label (CarperAI)", ("prompt", "label"), _completion_row("label")),
)


def _check_values(where: str, row: Row) -> None:
    """Raises InvalidRow for what neither a tokenizer, a file nor a reward function could take."""
    if _depth(row) > 1 + _MAX_NESTING:
        name = next(name for name, value in row.items() if _depth(value) > _MAX_NESTING)
        detail = f"field {name!r} is nested deeper than {_MAX_NESTING} levels."
        raise InvalidRow(where, "nested too deep", detail)
    try:
        _to_bytes(row)
    except UnicodeEncodeError as error:
        name = next(name for name, value in row.items() if not _is_unicode({name: value}))
        detail = (
            f"field {name!r} has half of a surrogate pair, {error.object[error.start]!r}, "
            "which is no Unicode text: an emoji was cut in two."
        )
        raise InvalidRow(where, "half a surrogate pair", detail) from error


def _to_bytes(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=str).encode()


def _is_unicode(row: Row) -> bool:
    try:
        return bool(_to_bytes(row))
    except UnicodeEncodeError:
        return False


def _depth(value: Any) -> int:
    """Levels of lists and objects, without recursion."""
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, list | tuple | dict)]:
        depth += 1
        level = [v for some in level for v in (some.values() if isinstance(some, dict) else some)]
    return depth


def _id(where: str, row: Row) -> str:
    """The row's own id, else where it stands: file name and line."""
    return str(row["id"]) if row.get("id") is not None else where.rsplit("/", 1)[-1]


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

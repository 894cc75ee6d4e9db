"""Rows of every public TL;DR schema, as groups of text.

1. `detect_schema` recognises a row by its field names alone.
2. `to_group` makes a `TextGroup` of it: prompts in one exact format, completions with one
   leading blank.
3. What cannot be used raises `InvalidRow`; news articles come back as a reason to leave them out.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from copg_jax.config.schema import FLOAT32_MAX
from copg_jax.data.formats.tldr import (
    Post,
    format_prompt,
    is_news_prompt,
    normalize_completion,
    parse_prompt,
)
from copg_jax.data.rows import Row
from copg_jax.errors import InputError

NEWS = "CNN/DM article, not a TL;DR post"
PAIR_SCORES = ("score_{}", "{}_score", "reward_{}", "{}_reward")
"""Names of the scores of a pair, "chosen" or "rejected" in the braces; they are its rewards."""


@dataclass(frozen=True)
class TextGroup:
    """One prompt with K completions as text; `where` is the `file:line` it came from.

    `rewards` has one entry per completion; None marks a completion to leave out. `is_choice`: they
    are a human choice, 1 and 0, and no scores.
    """

    id: str
    where: str
    prompt: str
    completions: tuple[str, ...]
    rewards: tuple[float | None, ...] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    is_choice: bool = False


class InvalidRow(InputError):
    """A bad row; `reason` is the short text under which `invalid_rows=drop` counts it."""

    def __init__(self, where: str, reason: str, detail: str) -> None:
        super().__init__(
            f"{where}: {detail} Fix the row, or set data.invalid_rows=drop to leave out and count "
            "such rows."
        )
        self.reason = reason


def to_group(where: str, row: Row) -> TextGroup | str:
    """Makes a group of one row of any known schema, or returns the reason why it is left out.

    Raises:
        InvalidRow: unknown schema, missing or mistyped field, empty or identical texts, number
            that is not finite.
    """
    group = detect_schema(where, row).make(where, row)
    if isinstance(group, str):
        return group
    if not group.prompt.strip():
        raise InvalidRow(where, "empty prompt", "field 'prompt' is empty.")
    post = parse_prompt(group.prompt)
    if post is not None and not post.post.strip():
        raise InvalidRow(where, "empty post", "the post is empty: wanted text to summarise.")
    for index, text in enumerate(group.completions):
        if not text.strip():
            raise InvalidRow(
                where, "empty completion", f"completion {index} is empty: wanted text."
            )
    if len(group.completions) > 1 and len(set(group.completions)) == 1:
        raise InvalidRow(
            where,
            "identical completions",
            f"all {len(group.completions)} completions are the same text, so nothing tells them "
            "apart.",
        )
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
        (normalize_completion(summary),),
        columns=columns,
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
        texts.append(normalize_completion(_text(where, summary, "text", f"summaries[{index}].")))
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
        _id(where, info), where, format_prompt(post), tuple(texts), rewards, columns, is_choice=True
    )


def _pair_row(where: str, row: Row) -> TextGroup | str:
    # CarperAI's texts begin with the frame's own "TL;DR:", which our prompt ends with.
    texts = tuple(_text(where, row, name).removeprefix("TL;DR:") for name in ("chosen", "rejected"))
    kinds = [[form.format(side) for side in ("chosen", "rejected")] for form in PAIR_SCORES]
    kinds = [names for names in kinds if any(row.get(name) is not None for name in names)]
    if len(kinds) + (row.get("rewards") is not None) > 1:
        found = [name for names in (*kinds, ["rewards"]) for name in names if name in row]
        detail = f"fields {found}: wanted the scores of a pair once."
        raise InvalidRow(where, "scores more than once", detail)
    scores = {name: _typed(where, row, name, object) for names in kinds for name in names}
    rewards = _rewards(where, row, len(texts)) or _numbers(where, scores)
    used = ("prompt", "chosen", "rejected", "rewards")
    group = _prompt_row(where, row, texts, rewards or (1.0, 0.0), used=used)
    return group if isinstance(group, str) else replace(group, is_choice=not rewards)


def _completion_row(name: str) -> Callable[[str, Row], TextGroup | str]:
    def make(where: str, row: Row) -> TextGroup | str:
        text = _text(where, row, name)
        row = {**row, "reference": row.get("reference", text.strip())}
        return _prompt_row(where, row, (text,), None, used=("prompt", name))

    return make


def _group_row(where: str, row: Row) -> TextGroup | str:
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
) -> TextGroup | str:
    """Shared end of the schemas with a ready-made prompt; fields not `used` become columns."""
    prompt = _text(where, row, "prompt")
    if is_news_prompt(prompt):
        return NEWS
    columns = {name: value for name, value in row.items() if name not in used and name != "id"}
    post = parse_prompt(prompt)
    if post is not None:
        prompt = format_prompt(post)
        columns = {"subreddit": post.subreddit, "title": post.title} | columns
    return TextGroup(
        _id(where, row),
        where,
        prompt,
        tuple(map(normalize_completion, texts)),
        rewards,
        columns=columns,
    )


# First match wins: those with more, and more particular, fields come first.
SCHEMAS = (
    Schema("OpenAI comparisons", ("info", "summaries", "choice"), _comparison_row),
    Schema("OpenAI TL;DR posts", ("subreddit", "title", "post", "summary"), _post_row),
    Schema("k-way groups (rewards optional)", ("prompt", "completions"), _group_row),
    Schema("preference pairs", ("prompt", "chosen", "rejected"), _pair_row),
    Schema("prompt and completion", ("prompt", "completion"), _completion_row("completion")),
    Schema("prompt and label (CarperAI)", ("prompt", "label"), _completion_row("label")),
)


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

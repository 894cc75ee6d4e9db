"""Values of a row that nothing could use."""

import json
from collections.abc import Iterator
from typing import Any

from copg_jax.data.rows import InvalidRow, Row

_MAX_NESTING = 100  # far above real data, far below what a library may recurse


def check_values(where: str, row: Row) -> None:
    """Raises InvalidRow for what neither a tokenizer, a file nor a reward function could take."""
    if _depth(row) > 1 + _MAX_NESTING:
        name = next(name for name, value in row.items() if _depth(value) > _MAX_NESTING)
        detail = f"field {name!r} is nested deeper than {_MAX_NESTING} levels."
        raise InvalidRow(where, "nested too deep", detail)
    for name in (name for name, value in row.items() if _has_nul(value)):
        detail = f"field {name!r} has the character NUL (\\0), which is no text: remove it."
        raise InvalidRow(where, "NUL in a text", detail)
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


def _has_nul(value: Any) -> bool:
    return any("\0" in item for level in _levels(value) for item in level if isinstance(item, str))


def _depth(value: Any) -> int:
    """Levels of lists and objects."""
    return sum(1 for _ in _levels(value)) - 1


def _levels(value: Any) -> Iterator[list[Any]]:
    """A value, what is in it, what is in that, and so on; without recursion."""
    level = nested = [value]
    while nested:
        yield level
        nested = [v for v in level if isinstance(v, list | tuple | dict)]
        level = [v for some in nested for v in (some.values() if isinstance(some, dict) else some)]

"""Rows of a data set, read one at a time so that host memory stays flat.

1. `read_rows` yields `(where, row)`: `where` is `file:line` for every error text to come.
2. A row that cannot be read comes as the `InvalidRow` that says why, so that reading can go on.
3. `rename` gives fields that have other names in a data set those that are known.
4. A path that is not local and looks like `owner/name` is streamed from the hub.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from copg_jax.data.sources import COMPRESSED, find_files, is_hub_id
from copg_jax.errors import InputError

Row = dict[str, Any]

# Data sets that exist on the hub only as a loading script; their Parquet copies hold
# `{folder}/{split}/*.parquet` at this revision.
PARQUET_REVISION = "refs/convert/parquet"
SCRIPT_ONLY = {"openai/summarize_from_feedback": "comparisons"}
_PARQUET_BATCH_ROWS = 256


class InvalidRow(InputError):
    """A bad row; `reason` is the short text under which `invalid_rows=drop` counts it."""

    def __init__(self, where: str, reason: str, detail: str) -> None:
        super().__init__(
            f"{where}: {detail} Fix the row, or set data.invalid_rows=drop to leave out and count "
            "such rows."
        )
        self.reason = reason


def read_rows(
    path: str, *, split: str = "train", revision: str | None = None, subset: str | None = None
) -> Iterator[tuple[str, Row | InvalidRow]]:
    """Yields `(where, row)` for each row of a local file, folder, glob or hub data set.

    Args:
        path: file of `sources.SUFFIXES`, folder or glob of such, or hub id `owner/name`.
        split: hub split; in a folder whose files are named after splits, the files to read.
        revision: hub revision; None is the default branch (the Parquet one of a script-only set).
        subset: configuration of a hub data set that has several.

    Raises:
        InputError: unreadable file, or malformed JSON (with line and column); a subset of files.
    """
    if is_hub_id(path):
        yield from _read_hub(path, split, revision, subset)
        return
    if subset is not None:
        raise InputError(
            f"data.subset: {subset!r} is a configuration of a data set of the hub, but {path} is "
            "local. Fix: leave it out, and name the files that you mean."
        )
    for file in find_files(path, split):
        reader = _read_parquet if file.suffix == ".parquet" else _read_json
        try:
            yield from reader(file)
        except OSError as error:
            fix = "Check the file and its permissions."
            if file.suffix in COMPRESSED:
                fix = "Where it is damaged or cut short, fetch it again."
            raise InputError(f"{file}: cannot be read ({error}). {fix}") from error


def rename(where: str, row: Row, names: Mapping[str, str]) -> Row:
    """The row with `data.columns`: for each field that is known, the name it has in the row.

    Raises:
        InvalidRow: no such field, or the known name is there too.
    """
    for name, own in names.items():
        is_read = f"data.columns reads '{name}' from the field {own!r}, "
        if own not in row:
            detail = f"{is_read}which is missing; the row has {sorted(row)}."
            raise InvalidRow(where, f"no field '{own}'", detail)
        if name in row and name not in names.values():
            detail = f"{is_read}but the row has {name!r} too: wanted one field for it."
            raise InvalidRow(where, "two fields for one", detail)
    kept = {name: value for name, value in row.items() if name not in names.values()}
    return kept | {name: row[own] for name, own in names.items()}


def _read_json(file: Path) -> Iterator[tuple[str, Row | InvalidRow]]:
    with _open(file) as stream:
        start = stream.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        if start.startswith(b"["):
            # An array is read whole, having no lines to stop at: large data belongs in JSON lines.
            rows = _parse_json(stream.read(), file, 1)
            if isinstance(rows, InvalidRow):
                raise InputError(
                    f"{rows}\nRows of an array cannot be left out: write one JSON object a line."
                )
            for number, row in enumerate(rows, start=1):
                where = f"{file}:[{number}]"
                yield where, _checked(where, row)
            return
        for number, line in enumerate(stream, start=1):
            if line.strip():
                where = f"{file}:{number}"
                yield where, _checked(where, _parse_json(line.rstrip(b"\r\n"), file, number))


def _open(file: Path) -> io.BufferedReader:
    """The bytes of a file, without its compression."""
    import pyarrow as pa

    if file.suffix not in COMPRESSED:
        return file.open("rb")
    stream: Any = pa.input_stream(file, compression={".gz": "gzip", ".zst": "zstd"}[file.suffix])
    return io.BufferedReader(stream)


class _Twice(ValueError):
    """A name that is in one JSON object twice."""


def _parse_json(text: bytes, file: Path, line: int) -> Any:
    """The value of a text, or the `InvalidRow` for JSON that is well formed and no value of ours.

    Raises:
        InputError: malformed JSON, or not UTF-8.
    """
    where = f"{file}:{line}"
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file}:{line + error.lineno - 1}: malformed JSON at column {error.colno}: "
            f"{error.msg}. Wanted one JSON object a line (or one array of objects). A last line "
            "cut short means an incomplete copy: fetch it again."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 text (byte {error.start}). Convert the file to UTF-8."
        ) from error
    except RecursionError:
        return InvalidRow(where, "nested too deep", "values are nested too deep to be read.")
    except _Twice as error:
        return InvalidRow(where, "field twice", f"field {error} is there twice: wanted it once.")
    except ValueError:  # of Python's limit on the digits of an integer
        return InvalidRow(where, "number too long", "a number has too many digits to be read.")


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise _Twice(repr(name))
    return found


def _checked(where: str, row: Any) -> Row | InvalidRow:
    if isinstance(row, dict | InvalidRow):
        return row
    detail = f"wanted a JSON object with named fields, got {type(row).__name__}."
    return InvalidRow(where, "wrong type", detail)


def _read_parquet(file: Path) -> Iterator[tuple[str, Row | InvalidRow]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # memory_map keeps the file's bytes out of the process; batches keep the decoded rows few.
        with pq.ParquetFile(file, memory_map=True) as table:
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                ((name, _),) = Counter(names).most_common(1)
                raise InputError(f"{file}: column {name!r} is there twice: wanted it once.")
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for index in range(len(batch)):
                    number += 1
                    where = f"{file}:{number}"
                    yield where, _parquet_row(where, batch, index)
    except pa.ArrowException as error:
        raise InputError(
            f"{file}: not a readable Parquet file ({error}). Fetch or write it again."
        ) from error


def _parquet_row(where: str, batch: Any, index: int) -> Row | InvalidRow:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except (ValueError, OverflowError) as error:  # no UTF-8 text, no date of Python
            return InvalidRow(
                where, "unreadable value", f"field {name!r} cannot be read ({error})."
            )
    return row


def _read_hub(
    path: str, split: str, revision: str | None, subset: str | None
) -> Iterator[tuple[str, Row]]:
    import datasets

    options: dict[str, Any] = {"split": split, "streaming": True}
    if subset is not None:
        options["name"] = subset
    if path in SCRIPT_ONLY:
        revision = revision or PARQUET_REVISION
        options["data_files"] = {split: f"{SCRIPT_ONLY[path]}/{split}/*.parquet"}
    try:
        stream = datasets.load_dataset(path, revision=revision, **options)
        for number, row in enumerate(stream, start=1):
            yield f"{path}[{split}]:{number}", dict(row)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: not a local path, and the hub's data set of that name could not be read "
            f"(split '{split}', revision {revision or 'default'}, subset {subset or 'default'}): "
            f"{type(error).__name__}: {error}. Check data.path, data.split, data.revision, "
            "data.subset and the network, or download the files and give their local path."
        ) from error

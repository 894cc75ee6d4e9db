"""Rows of a data set, read one at a time so that host memory stays flat.

1. `find_files` turns a path (file, folder or glob) into a sorted list of local files.
2. `read_rows` yields `(where, row)`: `where` is `file:line` for every error text to come.
3. A path that is not local and looks like `owner/name` is streamed from the hub.
4. `fingerprint` hashes the files' contents, so that prepared data is reused only while valid.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

from copg_jax.errors import InputError
from copg_jax.files import local_copy

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".parquet")
SIDE_CAR = "scored.json"
# Data sets that exist on the hub only as a loading script; their Parquet copies hold
# `{folder}/{split}/*.parquet` at this revision.
PARQUET_REVISION = "refs/convert/parquet"
SCRIPT_ONLY = {"openai/summarize_from_feedback": "comparisons"}
_PARQUET_BATCH_ROWS = 256


def read_rows(
    path: str, *, split: str = "train", revision: str | None = None
) -> Iterator[tuple[str, Row]]:
    """Yields `(where, row)` for each row of a local file, folder, glob or hub data set.

    Args:
        path: `.jsonl`, `.json` or `.parquet` file, folder or glob of such, or hub id `owner/name`.
        split: hub split; in a folder whose files are named after splits, the files to read.
        revision: hub revision; None is the default branch (the Parquet one of a script-only set).

    Raises:
        InputError: unreadable file, malformed JSON (with line and column), row not an object.
    """
    if is_hub_id(path):
        yield from _read_hub(path, split, revision)
        return
    for file in find_files(path, split):
        reader = _read_parquet if file.suffix == ".parquet" else _read_json
        try:
            yield from reader(file)
        except OSError as error:
            raise InputError(
                f"{file}: cannot be read ({error}). Check the file and its permissions."
            ) from error


def is_hub_id(path: str) -> bool:
    """Whether `path` means a hub data set: `owner/name`, and nothing local is called so."""
    return (
        re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None
        and not path.endswith(SUFFIXES)
        and not Path(path).exists()
    )


def find_files(path: str, split: str = "train") -> list[Path]:
    """Returns the data files behind a path or a URL (local copies of them), sorted by name.

    In a folder, files named after splits (`train.jsonl`, `valid-00000.parquet`, `test/0.parquet`)
    are kept only if they are of `split`; a folder without such names is read whole.

    Raises:
        InputError: nothing there, no data file in the folder, or no file of this split.
    """
    place = Path(local_copy(path, SUFFIXES))
    if place.is_dir():
        if (place / SIDE_CAR).exists():
            files = sorted(place.glob("part-*.parquet"))
        else:
            files = sorted(f for f in place.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        return _files_of_split(place, files, split)
    files = (
        [place]
        if place.exists()
        else [Path(name) for name in sorted(glob(str(place), recursive=True))]
    )
    if not files:
        raise InputError(
            f"{path}: no such file or folder. Wanted a local file, folder or glob of "
            f"{', '.join(SUFFIXES)}, or a data set's hub id 'owner/name'. Check data.path "
            "(relative paths start at the working directory)."
        )
    for file in files:
        if file.suffix not in SUFFIXES:
            raise InputError(
                f"{file}: unknown file type '{file.suffix}'. Wanted one of {', '.join(SUFFIXES)}."
            )
    return files


def fingerprint(path: str, *, split: str = "train", revision: str | None = None) -> str:
    """Returns a hash of the contents behind `path`.

    Note:
        For a hub id it covers id, split and revision only: a commit as revision pins the contents.
    """
    digest = hashlib.sha256()
    if is_hub_id(path):
        digest.update(repr((path, split, revision)).encode())
        return digest.hexdigest()
    for file in find_files(path, split):
        digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
        try:
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise InputError(
                f"{file}: cannot be read ({error}). Check the file and its permissions."
            ) from error
    return digest.hexdigest()


def split_family(name: str) -> str | None:
    """Returns `train`, `valid` or `test` for a name that starts so (`valid1`, `validation`)."""
    match = re.match(r"(train|valid|test)(?:ation|ing)?(?![a-z])", name)
    return match.group(1) if match else None


def _files_of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    if not files:
        raise InputError(
            f"{folder}: the folder holds no data file. Wanted at least one of "
            f"{', '.join(SUFFIXES)}."
        )
    names = {file: file.relative_to(folder).parts for file in files}
    families = {
        file: next((family for part in parts if (family := split_family(part))), None)
        for file, parts in names.items()
    }
    if not any(families.values()):
        return files
    chosen = [file for file in files if families[file] == (split_family(split) or split)]
    if not chosen:
        found = sorted({family for family in families.values() if family})
        raise InputError(
            f"{folder}: no file of split '{split}'; there are files of {found}. Set data.split."
        )
    return chosen


def _read_json(file: Path) -> Iterator[tuple[str, Row]]:
    with file.open("rb") as stream:
        start = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        stream.seek(0)
        if start.startswith(b"["):
            # An array is read whole, having no lines to stop at: large data belongs in JSON lines.
            for number, row in enumerate(_parse_json(stream.read(), file, 1), start=1):
                yield _checked(f"{file}:[{number}]", row)
            return
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _checked(f"{file}:{number}", _parse_json(line.rstrip(b"\r\n"), file, number))


def _parse_json(text: bytes, file: Path, line: int) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file}:{line + error.lineno - 1}: malformed JSON at column {error.colno}: "
            f"{error.msg}. Wanted one JSON object a line (or one array of objects). A last line "
            "cut short means an incomplete copy: fetch it again."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}:{line}: not UTF-8 text (byte {error.start}). Convert the file to UTF-8."
        ) from error


def _checked(where: str, row: Any) -> tuple[str, Row]:
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: wanted a JSON object with named fields, got {type(row).__name__}."
        )
    return where, row


def _read_parquet(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # memory_map keeps the file's bytes out of the process; batches keep the decoded rows few.
        with pq.ParquetFile(file, memory_map=True) as table:
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", row
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{file}: not a readable Parquet file ({error}). Fetch or write it again."
        ) from error


def _read_hub(path: str, split: str, revision: str | None) -> Iterator[tuple[str, Row]]:
    import datasets

    options: dict[str, Any] = {"split": split, "streaming": True}
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
            f"(split '{split}', revision {revision or 'default'}): {type(error).__name__}: "
            f"{error}. Check data.path, data.split, data.revision and the network, or download "
            "the files and give their local path."
        ) from error

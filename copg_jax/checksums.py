"""Files and folders of ours that tell whether they are whole and unchanged.

1. A record is a small JSON file that holds its own checksum: `write_record`, `read_record`.
2. A sealed folder has a record, `checksums.json`, with the checksums of its files; it comes last,
   so that a folder that has it is whole. `check` finds what has changed since `seal`.
3. What is missing, malformed or changed is `Damaged`. What cannot be read now is an InputError that
   is not: a network that does not answer must not cost what is whole.

Checksums are SHA-256: 2 GB/s on one core, and a few files are read at once.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from etils import epath

from copg_jax.errors import Damaged, InputError
from copg_jax.files import bucket_errors, write_text

NAME = "checksums.json"

_OWN = "checksum"  # of a record, beside its values
_PIECE_BYTES = 1 << 15  # larger ones are not faster
_THREADS = 4


def write_record(path: epath.PathLike, values: Mapping[str, Any]) -> None:
    """Writes a JSON object with its checksum, in place of an earlier one, at once or not at all."""
    read_back = json.loads(json.dumps(dict(values)))  # a key of JSON is a string
    write_text(path, json.dumps(read_back | {_OWN: _sum_of_values(read_back)}, indent=1) + "\n")


def read_record(path: epath.PathLike, *, wanted: Collection[str] = (), fix: str) -> dict[str, Any]:
    """Reads what `write_record` wrote.

    Args:
        path: the file.
        wanted: names that it has to have.
        fix: the way out, for the error.

    Raises:
        Damaged: absent, malformed, changed, or without one of the names.
        InputError: it cannot be read now.
    """
    values = read_object(path, fix=fix)
    missing = sorted({*wanted, _OWN} - values.keys())
    if missing:
        raise Damaged(f"{path}: {', '.join(missing)} missing: not a file of this version. {fix}")
    if values.pop(_OWN) != _sum_of_values(values):
        raise Damaged(f"{path}: damaged: its values do not fit its checksum. {fix}")
    return values


def read_object(path: epath.PathLike, *, fix: str) -> dict[str, Any]:
    """Reads a JSON object, whoever wrote it; arguments and errors are those of `read_record`."""
    with _reading(path, fix):
        raw = epath.Path(path).read_bytes()
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: damaged: wanted JSON ({error}). {fix}") from error
    if not isinstance(values, dict):
        raise Damaged(f"{path}: wanted a JSON object, got {type(values).__name__}. {fix}")
    return values


def file_sum(path: epath.PathLike, *, fix: str = "Check the file and its permissions.") -> str:
    """SHA-256 (hex) of the contents of a file.

    Raises:
        Damaged: there is no such file; ends in `fix`.
        InputError: it cannot be read now.
    """
    digest = hashlib.sha256()
    with _reading(path, fix), epath.Path(path).open("rb") as stream:
        while piece := stream.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _reading(path: epath.PathLike, fix: str) -> Iterator[None]:
    """Raises Damaged, which ends in `fix`, where there is no such file, and else InputError."""
    with bucket_errors(path):
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise Damaged(f"{path}: cannot be read ({error.strerror or error}). {fix}") from error
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror or error}). Fix: see to its disk, "
                "network and permissions, and run the same command again."
            ) from error


def seal(
    folder: epath.PathLike, facts: Mapping[str, Any] | None = None, *, leave_out: str = ""
) -> None:
    """Writes the checksums of all files in a folder, and facts about it.

    Args:
        folder: complete but for this.
        facts: JSON values, kept with the checksums; see `note`.
        leave_out: name of a file that may be changed, or come later.
    """
    folder = epath.Path(folder)
    with bucket_errors(folder):
        names = sorted(set(_names(folder)) - {NAME, leave_out})
        write_record(folder / NAME, {"files": _sums(folder, names), "facts": dict(facts or {})})


def is_sealed(folder: epath.PathLike) -> bool:
    """Whether a folder has checksums; one of another program has none."""
    with _reading(folder, fix=""):
        return (epath.Path(folder) / NAME).exists()


def check(folder: epath.PathLike, *, fix: str, but: str = "") -> dict[str, Any]:
    """Compares the files of a sealed folder with their checksums and returns its facts.

    Args:
        folder: a sealed folder; files that came later are not looked at.
        fix: the way out, for the error.
        but: ending of the names of files that are not looked at.

    Raises:
        Damaged: not sealed, or a file of it is absent or changed; names the first.
        InputError: one cannot be read now.
    """
    folder = epath.Path(folder)
    record = read_record(folder / NAME, wanted=("files", "facts"), fix=fix)
    names = sorted(name for name in record["files"] if not (but and name.endswith(but)))
    for name in names:
        with _reading(folder / name, fix):
            is_there = (folder / name).exists()
        if not is_there:
            raise Damaged(f"{folder / name}: missing; {NAME} lists it. {fix}")
    for name, found in _sums(folder, names).items():
        expect_sum(folder / name, found, record["files"][name], fix=fix)
    return record["facts"]


def check_file(path: epath.PathLike, wanted: str, *, fix: str) -> None:
    """Raises Damaged, which ends in `fix`, unless a file has the checksum that is wanted."""
    expect_sum(path, file_sum(path, fix=fix), wanted, fix=fix)


def expect_sum(path: epath.PathLike, found: str, wanted: str, *, fix: str) -> None:
    """`check_file` of a file whose checksum is known."""
    if found != wanted:
        raise Damaged(
            f"{path}: damaged or changed since it was written: wanted SHA-256 {wanted[:12]}…, got "
            f"{found[:12]}…. {fix}"
        )


def sealed_sums(folder: epath.PathLike, *, fix: str) -> dict[str, str]:
    """The checksums that a folder was sealed with, by name; none where it is not sealed."""
    if not is_sealed(folder):
        return {}
    return read_record(epath.Path(folder) / NAME, wanted=("files", "facts"), fix=fix)["files"]


def note(folder: epath.PathLike, facts: Mapping[str, Any]) -> None:
    """Exchanges facts of a sealed folder, at once or not at all."""
    path = epath.Path(folder) / NAME
    record = read_record(path, wanted=("files", "facts"), fix="Restore it from a copy.")
    with bucket_errors(path):
        write_record(path, record | {"facts": record["facts"] | dict(facts)})


def _sums(folder: epath.Path, names: Collection[str]) -> dict[str, str]:
    with ThreadPoolExecutor(_THREADS) as threads:  # hashing and reading release the lock
        return dict(zip(names, threads.map(lambda n: file_sum(folder / n), names), strict=True))


def _names(folder: epath.Path) -> list[str]:
    """Paths of all files below a folder, from there."""
    found = []
    for item in folder.iterdir():
        if item.is_dir():
            found += [f"{item.name}/{name}" for name in _names(item)]
        else:
            found.append(item.name)
    return found


def _sum_of_values(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

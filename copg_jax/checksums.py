"""Files and folders of ours that tell whether they are whole and unchanged.

1. A record is a small JSON file that holds its own checksum: `write_record`, `read_record`.
2. A sealed folder has a record, `checksums.json`, with the checksums of its files; it comes last,
   so that a folder that has it is whole. `check` finds what has changed since `seal`.

Checksums are SHA-256: 2 GB/s on one core, and a few files are read at once.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from copg_jax.errors import InputError
from copg_jax.files import write_text

NAME = "checksums.json"

_OWN = "checksum"  # of a record, beside its values
_PIECE_BYTES = 1 << 15  # larger ones are not faster
_THREADS = 4


def write_record(path: epath.PathLike, values: Mapping[str, Any]) -> None:
    """Writes a JSON object with its checksum, in place of an earlier one, at once or not at all."""
    values = dict(values)
    write_text(path, json.dumps(values | {_OWN: _sum_of_values(values)}, indent=1) + "\n")


def read_record(path: epath.PathLike, *, wanted: Collection[str] = (), fix: str) -> dict[str, Any]:
    """Reads what `write_record` wrote.

    Args:
        path: the file.
        wanted: names that it has to have.
        fix: the way out, for the error.

    Raises:
        InputError: absent, unreadable, changed, or without one of the names.
    """
    values = read_object(path, fix=fix)
    missing = sorted({*wanted, _OWN} - values.keys())
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} missing: not a file of this version. {fix}")
    if values.pop(_OWN) != _sum_of_values(values):
        raise InputError(f"{path}: damaged: its values do not fit its checksum. {fix}")
    return values


def read_object(path: epath.PathLike, *, fix: str) -> dict[str, Any]:
    """Reads a JSON object, whoever wrote it; arguments and errors are those of `read_record`."""
    try:
        values = json.loads(epath.Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}). {fix}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged: wanted JSON ({error}). {fix}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: wanted a JSON object, got {type(values).__name__}. {fix}")
    return values


def file_sum(path: epath.PathLike, *, fix: str = "Check the file and its permissions.") -> str:
    """SHA-256 (hex) of the contents of a file.

    Raises:
        InputError: it cannot be read; ends in `fix`.
    """
    digest = hashlib.sha256()
    try:
        with epath.Path(path).open("rb") as stream:
            while piece := stream.read(_PIECE_BYTES):
                digest.update(piece)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}). {fix}") from error
    return digest.hexdigest()


def seal(
    folder: epath.PathLike, facts: Mapping[str, Any] | None = None, *, leave_out: str = ""
) -> None:
    """Writes the checksums of all files in a folder, and facts about it.

    Args:
        folder: complete but for this.
        facts: JSON values, kept with the checksums; see `note`.
        leave_out: name of a file that will still be changed.
    """
    folder = epath.Path(folder)
    names = sorted(set(_names(folder)) - {NAME, leave_out})
    write_record(folder / NAME, {"files": _sums(folder, names), "facts": dict(facts or {})})


def is_sealed(folder: epath.PathLike) -> bool:
    """Whether a folder has checksums; one of another program has none."""
    return (epath.Path(folder) / NAME).exists()


def check(folder: epath.PathLike, *, fix: str, but: str = "") -> dict[str, Any]:
    """Compares the files of a sealed folder with their checksums and returns its facts.

    Args:
        folder: a sealed folder; files that came later are not looked at.
        fix: the way out, for the error.
        but: ending of the names of files that are not looked at.

    Raises:
        InputError: not sealed, or a file of it is absent or changed; names the first.
    """
    folder = epath.Path(folder)
    record = read_record(folder / NAME, wanted=("files", "facts"), fix=fix)
    names = sorted(name for name in record["files"] if not (but and name.endswith(but)))
    for name in names:
        if not (folder / name).exists():
            raise InputError(f"{folder / name}: missing; {NAME} lists it. {fix}")
    for name, found in _sums(folder, names).items():
        expect_sum(folder / name, found, record["files"][name], fix=fix)
    return record["facts"]


def check_file(path: epath.PathLike, wanted: str, *, fix: str) -> None:
    """Raises InputError, which ends in `fix`, unless a file has the checksum that is wanted."""
    expect_sum(path, file_sum(path, fix=fix), wanted, fix=fix)


def expect_sum(path: epath.PathLike, found: str, wanted: str, *, fix: str) -> None:
    """`check_file` of a file whose checksum is known."""
    if found != wanted:
        raise InputError(
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

"""Files of a run, on a file system or in a bucket (gs://, s3://).

1. Folders that are written are `etils.epath.Path`s, which are both.
2. What has to be a local file (memory maps, tokenizers, safetensors) is read from a `local_copy`,
   and lies in a `scratch_folder` where a run makes it.
3. A `GrowingFile` is written line by line; objects of a bucket cannot grow.
4. `read_json_lines` is what reads JSON Lines that a run wrote.
"""

import fcntl
import hashlib
import json
import os
import posixpath
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from etils import epath
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from copg_jax.errors import InputError

_CACHE = Path.home() / ".cache" / "copg_jax"
_MAGIC = "*?["


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is a URL, such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def local_copy(path: str, suffixes: Sequence[str]) -> str:
    """The path itself, or of a URL the path of a copy on this machine's disk.

    The copy is named by what the bucket says of its objects, so that it is made once, and again
    when one of them has changed.

    Args:
        path: file, folder or glob.
        suffixes: endings of the files of a folder that are wanted.

    Raises:
        InputError: nothing there, or it cannot be read.
    """
    if not is_remote(path):
        return path
    with bucket_errors(path):
        system, root = url_to_fs(path)
        root = root.rstrip("/")
        first_sign = min((root.index(sign) for sign in _MAGIC if sign in root), default=len(root))
        parent = posixpath.dirname(root[:first_sign])
        found = system.find(root) if first_sign == len(root) else system.glob(root)
        names = [name for name in sorted(found) if name == root or name.endswith(tuple(suffixes))]
        state = [(name, system.ukey(name)) for name in names]
        copy = (
            _CACHE
            / "copies"
            / hashlib.sha256(repr((path.rstrip("/"), state)).encode()).hexdigest()[:16]
        )
        if names and not copy.exists():
            _download(system, {name: posixpath.relpath(name, parent) for name in names}, copy)
    if not names:
        raise InputError(f"{path}: nothing there that ends in {', '.join(suffixes)}.")
    return str(copy / posixpath.relpath(root, parent))


def _download(system: AbstractFileSystem, names: Mapping[str, str], copy: Path) -> None:
    """Makes the folder `copy` of objects and their names in it, while other processes wait."""
    part = copy.with_name(f"{copy.name}.{socket.gethostname()}")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.with_name(f"{part.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if copy.exists():
            return
        shutil.rmtree(part, ignore_errors=True)  # of a process that was ended
        targets = [part / name for name in names.values()]
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        system.get(list(names), list(map(str, targets)))
        try:
            part.rename(copy)
        except OSError:  # another host was faster, where they share this folder
            shutil.rmtree(part)


@contextmanager
def bucket_errors(path: epath.PathLike) -> Iterator[None]:
    """Turns whatever a bucket raises in the body into an InputError that names `path`."""
    try:
        yield
    except Exception as error:  # each kind of bucket fails in its own way
        if isinstance(error, InputError) or not is_remote(path):
            raise
        raise InputError(
            f"{path}: cannot be reached ({type(error).__name__}: {error}). Check the path and your "
            "credentials; gs:// needs the package gcsfs, which the tpu extra has."
        ) from error


def scratch_folder(folder: epath.Path, process: int) -> Path:
    """Where a run keeps what it maps into memory: its folder, or for a bucket one on this disk.

    Args:
        folder: output folder of the run.
        process: index of this process; each has its own.
    """
    if not is_remote(folder):
        return Path(folder)
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    return _CACHE / "runs" / name / f"process-{process}"


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes under another name, then renames: a reader never sees half a file."""
    path = epath.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read_json_lines(path: epath.PathLike) -> Iterator[tuple[str, Any]]:
    """Lines of a JSON Lines file, without their ends, and their values; ("", None) for a line that
    is no JSON, such as one that was cut short.
    """
    # Not `splitlines`: a text may hold other characters that end a line, which JSON keeps.
    for line in epath.Path(path).read_bytes().split(b"\n"):
        try:
            # Decoded line by line: the last one may be cut inside a character.
            text = line.decode()
            if text.strip():
                yield text, json.loads(text)
        except (ValueError, RecursionError):
            yield "", None


class GrowingFile:
    """A text file that is on disk at every `write`, or in a bucket at every `sync` and at the end.

    Args:
        path: the file.
        lines: what it begins with, in place of what is there.
    """

    def __init__(self, path: epath.PathLike, lines: Iterable[str] = ()) -> None:
        self._path = epath.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(path):
            self._file, self._lines = None, list(lines)
        else:
            write_text(self._path, "".join(lines))
            self._file, self._lines = self._path.open("a"), []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def write(self, lines: str) -> None:
        """Appends lines, their ends included."""
        if self._file is not None:
            self._file.write(lines)
            self._file.flush()
        else:
            self._lines.append(lines)

    def sync(self) -> None:
        """Sees to it that what was written outlives this process."""
        if self._file is not None:
            self._file.flush()  # what a full disk has refused before
        else:
            self._path.write_text("".join(self._lines))

    def close(self) -> None:
        """Ends writing."""
        try:
            self.sync()
        finally:
            if self._file is not None:
                self._file.close()

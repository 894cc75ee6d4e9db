"""The disk of a run: whether it holds what the run will write, and what is said if it fails."""

import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath

from copg_jax.errors import InputError
from copg_jax.files import is_remote

log = logging.getLogger(__name__)

_FIXES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or have the quota raised",
    errno.EROFS: "make it writable again",
    errno.EIO: "see that the disk is well (dmesg)",
}


@contextmanager
def disk_errors(folder: epath.PathLike) -> Iterator[None]:
    """Turns what a disk says in the body, through whatever library, into one InputError.

    Args:
        folder: what the body writes.
    """
    make_loud, has_failed = _make_libraries_quiet(), False
    try:
        yield
    except InputError:  # already says what is wrong
        raise
    except Exception as error:
        found = next(filter(None, map(_disk_error, _chain(error))), None)
        if found is None:
            raise
        has_failed, (code, path) = True, found
        where = path or os.fspath(folder)
        raise InputError(
            f"{where}: {os.strerror(code)}{_free_text(where)}. Nothing that was finished is lost. "
            f"Fix: {_FIXES[code]} and run the same command again; it goes on from the last whole "
            "checkpoint, part or prompt."
        ) from error
    finally:
        if not has_failed:
            make_loud()


def _make_libraries_quiet() -> Callable[[], None]:
    """Leaves out what Orbax and its threads print, over pages, of a failure that they raise too.

    Returns:
        What undoes this. Not to be called where the disk has failed: they go on until Python ends.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    hook = sys.unraisablehook

    def has_no_traceback(record: logging.LogRecord) -> bool:
        return not record.exc_info

    def unraisable(raised: Any) -> None:
        # Of TensorStore: a write that ended after Orbax had given up the whole checkpoint.
        if str(raised.exc_value) != "Event loop is closed":
            hook(raised)

    def make_loud() -> None:
        sys.unraisablehook = hook
        for logger in loggers:
            logger.removeFilter(has_no_traceback)

    sys.unraisablehook = unraisable
    for logger in loggers:
        logger.addFilter(has_no_traceback)
    return make_loud


def warn_of_space(folder: epath.PathLike, num_bytes: float) -> None:
    """Warns where the disk of a folder has less room than a run may write.

    Args:
        folder: output folder of the run, which exists.
        num_bytes: what the run may have on disk at a time, beside what is there now.
    """
    if is_remote(folder):
        return
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        log.warning(
            "output_dir %s: the run may write %s, and %s are free on its disk. Fix: free some "
            "space, or give an output_dir on another disk.",
            folder,
            _size_text(num_bytes),
            _size_text(free),
        )


def folder_bytes(folder: epath.PathLike) -> int:
    """Size of all files below a folder of this machine; 0 in a bucket or where there is none."""
    if is_remote(folder):
        return 0
    return sum(path.lstat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _disk_error(error: BaseException) -> tuple[int, str | None] | None:
    """Number and path of what a disk said; libraries that are not Python put it into their text."""
    if isinstance(error, OSError) and error.errno in _FIXES:
        return error.errno, None if error.filename is None else os.fspath(error.filename)
    for code in _FIXES:
        if os.strerror(code) in str(error):
            return code, None
    return None


def _free_text(path: str) -> str:
    if is_remote(path):
        return ""
    folder = next(
        (p for p in [Path(path), *Path(path).absolute().parents] if p.exists()), Path("/")
    )
    try:
        return f" ({_size_text(shutil.disk_usage(folder).free)} free)"
    except OSError:
        return ""


def _size_text(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"

"""The disk of a run: whether it holds what the run will write, and what is said if it fails."""

import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
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
_LIBRARIES = {"orbax", "tensorstore", "pyarrow", "safetensors"}
_LITTLE = 2**30  # bytes


@contextmanager
def disk_errors(folder: epath.PathLike) -> Iterator[None]:
    """Turns what a disk says in the body, through whatever library, into one InputError.

    Args:
        folder: what the body writes.
    """
    undo, has_failed = _leave_out_pages(), False
    try:
        yield
    except InputError:  # already says what is wrong
        raise
    except Exception as error:
        found = _find(error)
        if found is None:
            raise
        log.debug("what the disk said", exc_info=error)
        has_failed, (code, path) = True, found
        raise InputError(
            f"{_place(code, path, folder)}: {os.strerror(code)}{_free_text(path or folder)}. "
            f"Nothing that was finished is lost. Fix: {_FIXES[code]} and run the same command "
            "again; it goes on from the last whole checkpoint, part or prompt."
        ) from error
    finally:
        if not has_failed:
            undo()


def _leave_out_pages() -> Callable[[], None]:
    """Turns down to debug level what Orbax and its threads print of a disk that fails, over pages
    and before they raise it too; everything else they say stays as it is.

    Returns:
        What undoes this. Not to be called where the disk has failed: they go on until Python ends.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    hook = sys.unraisablehook

    def is_of_no_disk(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or _find(error) is None:
            return True
        log.debug("%s: %s", record.name, record.getMessage(), exc_info=error)
        return False

    def unraisable(raised: Any) -> None:
        # Of TensorStore: a write that ended after Orbax had given up the whole checkpoint.
        if str(raised.exc_value) == "Event loop is closed":
            log.debug("a write ended late: %s", raised.exc_value)
        else:
            hook(raised)

    def undo() -> None:
        sys.unraisablehook = hook
        for logger in loggers:
            logger.removeFilter(is_of_no_disk)

    sys.unraisablehook = unraisable
    for logger in loggers:
        logger.addFilter(is_of_no_disk)
    return undo


def warn_of_space(folder: epath.PathLike, num_bytes: float) -> None:
    """Warns where the disk of a folder has less room than a run may write.

    Args:
        folder: output folder of the run, which exists.
        num_bytes: what the run may have there at a time; what is there now is part of it.
    """
    if is_remote(folder):
        return
    num_bytes -= folder_bytes(folder)
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
    """An error, and those that it came of; a library's, also those that it met on the way."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (error.__context__ if _is_of_library(error) else None)


def _is_of_library(error: BaseException) -> bool:
    """Whether a library that writes raised it: one that is not Python raises what is built in.

    An error with no frame at all was never raised in Python: a thread of such a library set it.
    """
    if error.__traceback__ is None:
        return True
    frames = (frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__))
    names = [type(error).__module__, *filter(None, frames)]
    return any(name.partition(".")[0] in _LIBRARIES for name in names)


def _find(error: BaseException) -> tuple[int, str | None] | None:
    """What a disk said, in an error or in those that it came of."""
    return next(filter(None, map(_disk_error, _chain(error))), None)


def _disk_error(error: BaseException) -> tuple[int, str | None] | None:
    """Number and path of what a disk said; libraries that are not Python put it into their text."""
    if isinstance(error, OSError) and error.errno in _FIXES:
        return error.errno, None if error.filename is None else os.fspath(error.filename)
    if _is_of_library(error):
        return next(((code, None) for code in _FIXES if os.strerror(code) in str(error)), None)
    return None


def _place(code: int, path: str | None, folder: epath.PathLike) -> str:
    """The path that failed, else the output folder where it must be that one, else "a disk"."""
    if path is not None:
        return path
    free, is_local = _free(folder), not is_remote(folder)
    is_full = code == errno.ENOSPC and free is not None and free < _LITTLE
    is_locked = code == errno.EROFS and is_local and not os.access(_existing(folder), os.W_OK)
    if is_full or is_locked:
        return os.fspath(folder)
    return f"a disk (of output_dir {os.fspath(folder)}, of /tmp or of the home folder)"


def _existing(path: epath.PathLike) -> Path:
    """The path, or the nearest folder above it that exists."""
    above = [Path(path), *Path(path).absolute().parents]
    return next((p for p in above if p.exists()), Path("/"))


def _free(path: epath.PathLike) -> int | None:
    """Bytes free on the disk of a path; None for a bucket or a disk that does not say."""
    try:
        return None if is_remote(path) else shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def _free_text(path: epath.PathLike) -> str:
    free = _free(path)
    return "" if free is None else f" ({_size_text(free)} free at {os.fspath(path)})"


def _size_text(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"

"""A program of its own that draws samples, such as an inference engine.

1. `write_prompts` writes what it is asked, as a model reads it.
2. `call_engine` runs it, and ends it where it takes too long; of one that fails or hangs the last
   lines are shown.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from etils import epath

from copg_jax.data.groups import TokenGroup
from copg_jax.errors import InputError
from copg_jax.files import write_text
from copg_jax.runtime import Progress

_POLL_SEC = 0.2
_LAST_LINES = 12


def write_prompts(path: epath.Path, prompts: Iterable[TokenGroup]) -> None:
    """Writes prompts with their ids, a JSON line each."""
    rows = (
        {"id": row.id, "prompt": row.prompt, "prompt_token_ids": row.prompt_tokens.tolist()}
        | row.columns
        for row in prompts
    )
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def call_engine(
    command: Sequence[str],
    paths: Sequence[Path],
    *,
    said: Path,
    timeout_sec: float | None,
    pause: Callable[[], None],
) -> None:
    """Runs a command to its end.

    Args:
        command: the program and its arguments.
        paths: further arguments; the last one is the file that it is to write.
        said: file of what it prints.
        timeout_sec: longest time; None: any.
        pause: called while it runs; may raise, which ends it.

    Raises:
        InputError: no such program, one that fails, that takes too long, or that writes no file.
    """
    shown = " ".join(command)
    began = time.monotonic()
    with said.open("wb") as output, Progress(f"generator: {shown:.80}"):
        try:
            process = subprocess.Popen(
                [*command, *map(str, paths)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what it starts ends with it
            )
        except OSError as error:
            raise InputError(
                f"generator.command: {shown}: cannot be started ({error.strerror}). Fix: name a "
                "program by its path."
            ) from error
        try:
            while (status := _status(process)) is None:
                if timeout_sec is not None and time.monotonic() - began > timeout_sec:
                    raise InputError(
                        f"generator.command: {shown}: not done after generator.timeout_sec="
                        f"{timeout_sec:g}.{_last_lines(said)} Fix: see why it hangs, or give it "
                        "more time; the same command of the run calls it again."
                    )
                pause()
        finally:
            _end(process)
    if status:
        raise InputError(
            f"generator.command: {shown}: ended with status {status}.{_last_lines(said)} Fix: "
            "see why; the same command of the run calls it again."
        )
    if not paths[-1].exists():
        raise InputError(
            f"generator.command: {shown}: wanted it to write {paths[-1]}, its last argument, and "
            f"it did not.{_last_lines(said)}"
        )


def _status(process: subprocess.Popen[bytes]) -> int | None:
    """The exit status; None where it still runs after a moment."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(_POLL_SEC)
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends it and what it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_lines(said: Path) -> str:
    """The end of what it printed, for a message."""
    lines = said.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    if lines == [""]:
        return " It printed nothing."
    return f" Its last lines ({said}):\n" + "\n".join(lines[-_LAST_LINES:]) + "\n"

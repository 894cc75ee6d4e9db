"""Reward functions for workers, each of which does to one text what it should not."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

MARK = os.environ.get("HOSTILE_MARK", "")


def judge(prompts: list[Any], completions: list[str], **columns: Any) -> list[Any]:
    """The length of a text; some texts are orders."""
    return [_obey(text) for text in completions]


def _obey(text: str) -> Any:
    _mark()
    if text == "hang":
        time.sleep(999)
    if text == "hold":
        sum(iter(int, 1))  # never lets another thread have a turn
    if text == "exit":
        sys.exit(0)
    if text == "exit at once":
        os._exit(0)
    if text == "close":
        os.closerange(3, 256)
        time.sleep(999)
    if text == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "fork":
        reading, writing = os.pipe()
        if os.fork() == 0:
            _mark()
            os.write(writing, b"x")
            time.sleep(999)
        os.read(reading, 1)
    if text == "fork and return":
        os.fork()
    if text == "fork and raise" and os.fork() == 0:
        raise KeyError(text)
    if text == "raise":
        raise KeyError(text)
    if text == "memory":
        raise MemoryError
    if text == "print":
        print("so much to say", "x" * 1000)
    if text == "nan":
        return float("nan")
    return None if text == "none" else float(len(text))


def _mark() -> None:
    """Leaves the number of this process."""
    if MARK:
        with open(MARK, "a") as file:
            file.write(f"{os.getpid()}\n")


def reads_jax(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """Whether this process has imported jax, and where it would compute."""
    found = "jax" in sys.modules
    import jax

    return [float(found), float(jax.default_backend() == "cpu"), float(os.getpid())]


def changes(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """Empties what it is given."""
    size = len(completions)
    columns["topic"].clear()
    return [0.0] * size


def asks_for_a_secret(key: str) -> Any:
    """A factory of a function that says what it was given."""

    def function(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
        raise OSError(f"cannot log in with {key}")

    return function


def unfinished(folder: str, last: int = 99) -> Any:
    """A factory that ends processes that come later, from the second to the last that is named."""
    with Path(folder, "made").open("a") as file:
        file.write("x")
    if 1 < Path(folder, "made").stat().st_size <= last:
        os._exit(3)
    return judge


def forks(then: str) -> Any:
    """A factory that starts a process, which returns as well."""
    os.fork()
    return judge


def slow(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """A tenth of a second a text."""
    time.sleep(0.1 * len(completions))
    return [float(os.getpid())] * len(completions)

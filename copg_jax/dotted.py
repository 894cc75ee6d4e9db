"""Functions that a user names by their dotted path."""

import importlib
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from copg_jax.errors import Ended, InputError, hidden

# Where no user writes: this package, the standard library, frozen modules.
_NOT_THE_USERS = (f"{Path(__file__).parent}{os.sep}", sysconfig.get_path("stdlib"), "<")


def find(path: str, what: str, example: str) -> Callable[..., Any]:
    """Imports the callable behind a dotted path.

    Args:
        path: such as "copg_jax.rewards.rouge_l".
        what: what it is, for messages.
        example: a path that would do, for messages.

    Raises:
        InputError: no such module or attribute, an import that fails or exits, or not callable.
    """
    module_name, _, name = path.rpartition(".")
    try:
        with forks_end():
            found = getattr(importlib.import_module(module_name), name)
    except (KeyboardInterrupt, Ended):
        raise
    except BaseException as error:  # a module of the user's may do anything, `sys.exit(0)` too
        raise InputError(
            f"{what} {path!r}: wanted the dotted path of a callable, such as {example!r} (a module "
            f"of your own must be on PYTHONPATH); {describe(error)}"
        ) from error
    if not callable(found):
        raise InputError(f"{what} {path!r} is not a function, got {type(found).__name__}")
    return found


@contextmanager
def forks_end() -> Iterator[None]:
    """Ends a process that the user's code in the body forks, once it leaves the body: it would go
    on with all that this one does.
    """
    pid = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != pid:
            os._exit(1)


def describe(error: BaseException) -> str:
    """Type, text and the last of the user's own lines of what a function of theirs raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f", at {frame.filename}:{frame.lineno}"
        for frame in frames
        if not frame.filename.startswith(_NOT_THE_USERS) and "-packages" not in frame.filename
    ]
    try:
        text = str(error)
    except Exception as of_text:  # of a class of the user's own
        text = f"(its text fails: {type(of_text).__name__})"
    text = hidden(text)
    return f"{type(error).__name__}{': ' * bool(text)}{text}{own[-1] if own else ''}"


def shown(value: Any) -> str:
    """The beginning of how a value is written, and its type; of any value."""
    try:
        text = f"{hidden(repr(value)):.80}"  # whole: part of a secret is one
    except Exception:  # an integer of 5,000 digits, or a class of the user's own
        text = "a value that cannot be written"
    return f"{text} ({type(value).__name__})"

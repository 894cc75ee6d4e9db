"""The one exception for bad input: what was wanted, what was got, how to fix it; the one by which a
signal ends a run; and how text that is not ours, or is secret, comes to a terminal.
"""

import os
import unicodedata

_SHORTEST = 6  # characters of a secret; what is shorter, such as a split, is in many a word
_names: dict[str, str] = {}


class InputError(ValueError):
    """A mistake in what the user gave (file, field, folder), never a bug of this package.

    The text says what was wanted, what was got and how to fix it, and names the file and line or
    the field. Scripts print it without a traceback and exit with status 2.
    """


class Damaged(InputError):
    """A file that a run wrote is missing, or is not as it was written: reading it again does not
    help, unlike where a disk, a share or a bucket does not answer.
    """


class Ended(SystemExit):
    """A signal asks the run to end: never a fault of the function in which it arrives."""


def hide(variable: str) -> None:
    """From now on `hidden` shows the name of this environment variable instead of its value."""
    value = os.environ.get(variable, "")
    if len(value) >= _SHORTEST:
        for text in (value, repr(value)[1:-1]):
            _names[text] = f"${{oc.env:{variable}}}"


def hidden(text: str) -> str:
    """The text with the values of environment variables that were read, which may be secrets, by
    their names.
    """
    for value in sorted(_names, key=len, reverse=True):
        text = text.replace(value, _names[value])
    return text


def for_terminal(text: str) -> str:
    """The text with its control characters written out, so that none acts on a terminal."""
    kept = "\n\t"
    return "".join(
        repr(sign)[1:-1] if unicodedata.category(sign) == "Cc" and sign not in kept else sign
        for sign in text
    )

"""The one exception for bad input: what was wanted, what was got, how to fix it; the one by which a
signal ends a run; and how text that is not ours comes to a terminal.
"""

import unicodedata


class InputError(ValueError):
    """A mistake in what the user gave (file, field, folder), never a bug of this package.

    The text says what was wanted, what was got and how to fix it, and names the file and line or
    the field. Scripts print it without a traceback and exit with status 2.
    """


class Ended(SystemExit):
    """A signal asks the run to end: never a fault of the function in which it arrives."""


def for_terminal(text: str) -> str:
    """The text with its control characters written out, so that none acts on a terminal."""
    kept = "\n\t"
    return "".join(
        repr(sign)[1:-1] if unicodedata.category(sign) == "Cc" and sign not in kept else sign
        for sign in text
    )

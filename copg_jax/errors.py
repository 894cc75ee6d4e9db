"""The exception for bad input: what was wanted, what was got, how to fix it; and how text that
is not ours comes to a terminal.
"""

import unicodedata


class InputError(ValueError):
    """A mistake in what the user gave (file, field, folder), never a bug of this package.

    The text says what was wanted, what was got and how to fix it, and names the file and line or
    the field. Scripts print it without a traceback and exit with status 2.
    """


class Damaged(InputError):
    """A file that a run wrote is missing, or is not as it was written: reading it again does not
    help, unlike where a disk, a share or a bucket does not answer.
    """


def for_terminal(text: str) -> str:
    """The text with its control characters written out, so that none acts on a terminal."""
    kept = "\n\t"
    return "".join(
        repr(sign)[1:-1] if unicodedata.category(sign) == "Cc" and sign not in kept else sign
        for sign in text
    )

"""The one exception for bad input: what was wanted, what was got, how to fix it."""


class InputError(ValueError):
    """A mistake in what the user gave (file, field, folder), never a bug of this package.

    The text says what was wanted, what was got and how to fix it, and names the file and line or
    the field. Scripts print it without a traceback and exit with status 2.
    """

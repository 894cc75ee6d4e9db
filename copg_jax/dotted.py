"""Functions that a user names by their dotted path."""

import importlib
from collections.abc import Callable
from typing import Any

from copg_jax.errors import InputError


def find(path: str, what: str, example: str) -> Callable[..., Any]:
    """Imports the callable behind a dotted path.

    Args:
        path: such as "copg_jax.rewards.rouge_l".
        what: what it is, for messages.
        example: a path that would do, for messages.

    Raises:
        InputError: no such module or attribute, or not callable.
    """
    module_name, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{what} {path!r}: wanted the dotted path of a callable, such as {example!r} (a module "
            f"of your own must be on PYTHONPATH); {error}"
        ) from error
    if not callable(found):
        raise InputError(f"{what} {path!r} is not a function, got {type(found).__name__}")
    return found

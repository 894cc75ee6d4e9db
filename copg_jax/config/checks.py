"""Checks of single fields of a config; each raises InputError with the name of the field."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from copg_jax.errors import InputError


def require(config: Any, wanted: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raises InputError unless this holds for each of these fields that is not null."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise InputError(f"{name} must be {wanted}, got {value!r}")


def require_positive(config: Any, *names: str) -> None:
    """Raises InputError unless each of these counts is null or at least 1."""
    require(config, ">= 1", lambda count: count >= 1, *names)


def require_size(config: Any, *names: str) -> None:
    """Raises InputError unless each of these counts of what is computed at once is in range."""
    require(config, "in [1, 2**20]", lambda count: 1 <= count <= 2**20, *names)


def require_one_of(config: Any, choices: Sequence[str], *names: str) -> None:
    """Raises InputError unless each of these fields is one of the choices."""
    require(config, f"one of {', '.join(choices)}", choices.__contains__, *names)


_MAY_BE_SECRET = re.compile(r"//[^/]*@|[?#].*=", re.DOTALL)  # user@, ?name=value, #name=value


def require_path(name: str, path: str) -> None:
    """Raises InputError for an empty path, and for a URL that may have a password or token in it,
    which logs, side-cars and messages would show.
    """
    if not path.strip():
        raise InputError(f"{name} must be a path, got an empty text")
    scheme, _, rest = path.partition("://")
    if rest and _MAY_BE_SECRET.search(f"//{rest}"):
        raise InputError(
            f"{name} must be a URL without password or token, got one of {scheme}:// with user@, "
            "?name=value or #name=value, which may be one: leave that out, and give secrets in the "
            "file or environment variables of its client, such as GOOGLE_APPLICATION_CREDENTIALS "
            "or AWS_SECRET_ACCESS_KEY"
        )


def require_seed(config: Any) -> None:
    """Raises InputError unless the seed is one for NumPy and for JAX."""
    require(config, "in [0, 2**32)", lambda seed: 0 <= seed < 2**32, "seed")

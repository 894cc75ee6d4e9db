"""Fields of config dataclasses: a default and a help text."""

import dataclasses
from collections.abc import Callable
from typing import Any

from omegaconf import MISSING


def option(default: Any = MISSING, help: str = "") -> Any:
    """Dataclass field with a help text; required when no default is given."""
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def section(cls: Callable[[], Any]) -> Any:
    """Dataclass field that holds another config dataclass with its own defaults."""
    return dataclasses.field(default_factory=cls)

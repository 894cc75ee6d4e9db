"""Which fields of a config a piece of code reads."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from copg_jax.config.schema import field_types, iter_fields, join, section_class

# Reading all fields alike, whatever they mean: asdict and replace; generated __eq__ and __repr__.
_BLIND = (dataclasses.__file__, "<string>")


@contextmanager
def recorded_reads(config: Any) -> Iterator[set[str]]:
    """Collects the dotted names of the fields of `config` that are read in this context.

    Copies and comparisons of whole sections do not count, nor checks in `__post_init__`.
    """
    names = dict(_sections(config, ""))
    found: set[str] = set()

    def recording(self: Any, attribute: str) -> Any:
        if id(self) in names and attribute in type(self).__dataclass_fields__:
            caller = sys._getframe(1).f_code
            if caller.co_filename not in _BLIND and caller.co_name != "__post_init__":
                found.add(join(names[id(self)], attribute))
        return object.__getattribute__(self, attribute)

    classes = set(section_classes(type(config)))
    for cls in classes:
        cls.__getattribute__ = recording  # pyright: ignore
    try:
        yield found
    finally:
        for cls in classes:
            del cls.__getattribute__


def dead_fields(cls: type, reads: set[str]) -> list[str]:
    """Dotted names of the fields of a config that are not among `reads`."""
    return [field.name for field in iter_fields(cls) if field.name not in reads]


def section_classes(cls: type) -> Iterator[type]:
    """A config dataclass and those of its sections."""
    yield cls
    for hint in field_types(cls).values():
        nested = section_class(hint)
        if nested is not None:
            yield from section_classes(nested)


def _sections(config: Any, name: str) -> Iterator[tuple[int, str]]:
    """Yield the identity of every section and its dotted name; items of lists are [i]."""
    yield id(config), name
    for field in dataclasses.fields(config):
        value, child = getattr(config, field.name), join(name, field.name)
        for item in value if isinstance(value, list) else [value]:
            if dataclasses.is_dataclass(item):
                yield from _sections(item, f"{child}[i]" if isinstance(value, list) else child)

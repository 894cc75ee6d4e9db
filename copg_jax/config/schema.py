"""The schema that a config dataclass describes: names, types, defaults, and what violates it.

1. `iter_fields` walks the dataclass and its sections: the lines of `--help`.
2. `find_problems` walks plain values beside it: unknown fields with a did-you-mean, wrong types.
3. `as_written` gives every `str` field the text of its value.
4. `as_stored` gives plain values as files keep them: what the environment gave, by its name.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

COMMAND_LINE = "command line"
PATHS = ("path", "adapter", "output_dir")
"""Names of what is a path wherever it stands, in the arguments of a reward too."""
FLOAT32_MIN, FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""Sizes of a number that is neither 0 nor infinite on a device."""


class EnvironmentText(str):
    """A text that environment variables are part of, which may be a secret.

    Attributes:
      written: The text with `${oc.env:NAME}` in their place; this is what messages show.
    """

    written: str

    def __new__(cls, value: str, written: str = "") -> Self:
        text = super().__new__(cls, value)
        text.written = written
        return text

    def __repr__(self) -> str:
        return repr(self.written)


class FieldInfo(NamedTuple):
    """One line of `--help`."""

    name: str
    type: str
    default: str
    help: str


def iter_fields(cls: type, prefix: str = "") -> Iterator[FieldInfo]:
    """Yield every leaf field with its dotted name, those of sections in place."""
    helps = {field.name: field.metadata.get("help", "") for field in dataclasses.fields(cls)}
    for key, hint in field_types(cls).items():
        name, nested = join(prefix, key), section_class(hint)
        is_list = typing.get_origin(hint) is list
        if nested is None or is_list or _is_optional(hint):
            yield FieldInfo(name, _type_name(hint), _default_text(cls, key), helps[key])
        if nested is not None:
            yield from iter_fields(nested, f"{name}[i]" if is_list else name)


def find_problems(
    cls: type, values: Mapping[Any, Any], where: Mapping[str, str], *, prefix: str = "", root: type
) -> Iterator[str]:
    """Yield a text for every unknown field and wrong type.

    Args:
      cls: Dataclass of the section.
      values: Plain values of the section.
      where: Dotted name to "file:line".
      prefix: Dotted name of the section.
      root: Dataclass of the whole config, where a misplaced name is looked for.
    """
    hints = field_types(cls)
    for key, value in values.items():
        name = join(prefix, str(key))
        place = _place(name, where)
        if key not in hints:
            yield f"{place}: unknown field '{name}'; {_suggestion(cls, str(key), prefix, root)}"
            continue
        hint = hints[key]
        nested, is_list = section_class(hint), typing.get_origin(hint) is list
        if isinstance(value, str) and "${" in value:
            continue  # judged once it is resolved
        if nested is None or (value is None and _is_optional(hint)):
            if (fault := _fault(hint, value)) is not None:
                yield (
                    f"{place}: {name}: wanted {_type_name(hint)}{fault}, got {_got(value)}; "
                    f"set for example {name}={_default_text(cls, key)}"
                )
        elif not is_list:
            yield from _section_problems(nested, value, name, where, root)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from _section_problems(nested, item, f"{name}[{index}]", where, root)
        else:
            yield f"{place}: {name}: wanted a list of sections, got {_got(value)}"


def _section_problems(
    cls: type, value: Any, name: str, where: Mapping[str, str], root: type
) -> Iterator[str]:
    if isinstance(value, dict):
        yield from find_problems(cls, value, where, prefix=name, root=root)
    else:
        yield (
            f"{_place(name, where)}: {name}: wanted a section with the fields "
            f"{', '.join(field_types(cls))}; got {_got(value)}; remove it to keep the defaults"
        )


def field_types(cls: type) -> dict[str, Any]:
    """Type of each field, annotations resolved."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def section_class(hint: Any) -> type | None:
    """The dataclass of a section, `Section | None` or list of sections; None for a leaf."""
    for candidate in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(candidate) and isinstance(candidate, type):
            return candidate
    return None


def as_written(hint: Any, value: Any, text: Any) -> Any:
    """Plain values where each `str` field has its text, and paths have ~ expanded.

    Args:
      hint: Type of the value.
      value: Resolved values, as YAML types them.
      text: The same with the text of each scalar.
    """
    hint = _required(hint, value)
    if isinstance(value, dict):
        hints = _hints_below(hint, value)
        texts = text if isinstance(text, dict) else {}
        return {
            key: as_written(hints[key], child, texts.get(key, child))
            for key, child in value.items()
        }
    if isinstance(value, list):
        item = (typing.get_args(hint) or [Any])[-1]
        texts = text if isinstance(text, list) and len(text) == len(value) else value
        return [as_written(item, *pair) for pair in zip(value, texts, strict=True)]
    if value is None or hint not in (str, os.PathLike):
        return value
    return os.path.expanduser(str(text)) if hint is os.PathLike else str(text)


def as_stored(config: Any) -> dict[str, Any]:
    """Plain values of a config or section, as a file may keep them.

    Texts from the environment are kept as they are written: they may be secrets. Numbers are kept
    as they are.
    """
    written = lambda value: value.written if isinstance(value, EnvironmentText) else value
    return map_leaves(written, dataclasses.asdict(config))


def environment_hashes(config: Any) -> dict[str, str]:
    """Hash of each text from the environment that decides what is computed, by its field.

    Paths and the arguments of rewards, such as a key, may change between two runs of one config.
    """
    return {
        name: hashlib.sha256(value.encode()).hexdigest()
        for name, value in leaves(dataclasses.asdict(config))
        if isinstance(value, EnvironmentText)
        and name.rpartition(".")[2] not in PATHS
        and ".arguments" not in name
    }


def _hints_below(hint: Any, value: Mapping[Any, Any]) -> dict[Any, Any]:
    """Type of each value of a section or dictionary; that of a path is PathLike."""
    item = (typing.get_args(hint) or [Any])[-1]
    hints = {**field_types(hint)} if dataclasses.is_dataclass(hint) else {}  # pyright: ignore
    hints |= dict.fromkeys(PATHS, os.PathLike)
    return {key: hints.get(key, item) for key in value}


def map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    """Nested dictionaries and lists with every leaf changed."""
    if isinstance(value, dict):
        return {key: map_leaves(change, child) for key, child in value.items()}
    if isinstance(value, list):
        return [map_leaves(change, child) for child in value]
    return change(value)


def join(prefix: str, name: str) -> str:
    """Dotted name of a field in a section; the root section has the empty name."""
    return f"{prefix}.{name}" if prefix else name


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every leaf of nested mappings and lists."""
    if isinstance(value, Mapping) and (value or not name):
        for key, child in value.items():
            yield from leaves(child, join(name, str(key)))
    elif isinstance(value, list | tuple) and value:
        for index, child in enumerate(value):
            yield from leaves(child, f"{name}[{index}]")
    else:
        yield name, value


def _fault(hint: Any, value: Any) -> str | None:
    """None for a value of this type, else what is wanted beside the type."""
    if hint is Any or (isinstance(value, str) and "${" in value):
        return None  # anything will do, or it is judged once it is resolved
    hint = _required(hint, value)
    if (origin := typing.get_origin(hint)) in (list, dict):
        if not isinstance(value, origin):
            return ""
        items = value.values() if isinstance(value, dict) else value
        faults = [_fault(typing.get_args(hint)[-1], item) for item in items]
        return next((fault for fault in faults if fault is not None), None)
    if type(value) is not hint:
        try:
            plain = str(value) if isinstance(value, str) else value
            value = OmegaConf.merge(_schema_of(hint), {"value": plain}).value
        except (OmegaConfBaseException, OverflowError):
            return ""
    is_number = hint is not float or value == 0 or FLOAT32_MIN <= abs(float(value)) <= FLOAT32_MAX
    return None if is_number else " that is finite and not rounded to 0 in float32"


def _required(hint: Any, value: Any) -> Any:
    """The type without `| None` of a value that is not null."""
    if value is None or not _is_optional(hint):
        return hint
    return next(item for item in typing.get_args(hint) if item is not types.NoneType)


@functools.cache
def _schema_of(hint: Any) -> DictConfig:
    """The schema of one type alone: that of a whole section takes seven times as long."""
    return OmegaConf.structured(dataclasses.make_dataclass("Field", [("value", hint, MISSING)]))


def _suggestion(cls: type, key: str, prefix: str, root: type) -> str:
    """Did-you-mean: a near name in this section, else the same or a near name elsewhere."""
    siblings = list(field_types(cls))
    for near in difflib.get_close_matches(key, siblings, n=1):
        return f"did you mean '{join(prefix, near)}'?"
    elsewhere = {field.name.rpartition(".")[2]: field.name for field in iter_fields(root)}
    for near in difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.8):
        return f"did you mean '{elsewhere[near]}'?"
    return f"wanted one of: {', '.join(join(prefix, name) for name in siblings)}"


def _default_text(cls: type, key: str) -> str:
    """Default of a field as one would write it on the command line, VALUE when it has none."""
    (field,) = (field for field in dataclasses.fields(cls) if field.name == key)
    make = field.default_factory
    default = field.default if make is dataclasses.MISSING else make()
    if default is dataclasses.MISSING or default == MISSING:
        return "VALUE"
    return (default or "''") if isinstance(default, str) else json.dumps(default, default=str)


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(argument) for argument in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_name(argument) for argument in arguments)}]"
    return "null" if hint is types.NoneType else getattr(hint, "__name__", str(hint))


def _is_optional(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint)


def _got(value: Any) -> str:
    kind = "str" if isinstance(value, str) else type(value).__name__
    return "nothing" if value is None else f"{value!r:.200} ({kind})"


def _place(name: str, where: Mapping[str, str]) -> str:
    """File and line of a field, or of the nearest section above it that was set."""
    while name and name not in where:
        name = name[: max(name.rfind("."), name.rfind("["), 0)]
    return where.get(name, COMMAND_LINE)

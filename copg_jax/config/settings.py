"""What files and arguments set, in order, and where each value stands.

A YAML file holds fields of a config, and under two kinds of other names:

- the names of stages, one or several (`sft, reward:`): fields that hold for these stages only, so
  that one file serves the whole pipeline;
- `shared`: values of any name, which fields read as `${shared.NAME}`. What nothing reads is
  refused, since it is a typo.

An argument `name=value` does the same for one value.

Beside its value as YAML types it, every scalar keeps its text: a field of type `str` takes it as it
is written, so that `007` or `on` are not a number and a boolean before the field is known.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from copg_jax.config.schema import (
    COMMAND_LINE,
    field_types,
    find_problems,
    iter_fields,
    join,
    leaves,
)
from copg_jax.errors import InputError

SHARED = "shared"
_READ = re.compile(r"\$\{(" + SHARED + r"\.[\w.]*)")
_INNERMOST = re.compile(r"\$\{[^${}:]*\}")  # reads a value
_RESOLVER = re.compile(r"\$\{([^{}:]*):")
_UNCLEAR = re.compile(r"\$\{oc\.env:(?!\w+[,}])|\\\\\$\{")
_FAULTS = (yaml.YAMLError, OmegaConfBaseException)
_MOST_KEYS, _DEEPEST = 10_000, 32  # aliases expanded
_LONGEST_FILE, _LONGEST_VALUE, _MOST_READS = 1_000_000, 100_000, 100  # characters; ${ in a value
_UNWRITABLE = re.compile(r"[\0\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-6 is a number and a date is a text."""


_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789"))
for _resolvers in _Loader.yaml_implicit_resolvers.values():
    _resolvers[:] = [pair for pair in _resolvers if pair[0] != f"{_TAG}timestamp"]


class _Key(NamedTuple):
    """A key of a file or an argument."""

    name: str  # dotted
    place: str  # "file:line" or "command line"
    is_section: bool = True  # merges with what was set before; anything else replaces it
    text: str | None = None  # of a scalar, as it is written


class Settings:
    """Layers of plain values for one config dataclass; interpolations are unresolved.

    Attributes:
      cls: The config dataclass.
      layers: Fields to merge, the last one wins.
      shared: Values below `shared` to merge, the last one wins.
      where: Dotted name to the place that set it last.
      texts: Dotted name of a scalar to its text there.
      problems: Unknown fields and wrong types so far.
    """

    def __init__(self, cls: type, stages: Mapping[str, type]) -> None:
        self.layers: list[dict[Any, Any]] = []
        self.shared: list[dict[Any, Any]] = []
        self.where: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.problems: list[str] = []
        self.cls = cls
        self._stages = stages
        self._reads: set[str] = set()

    def add_file(self, path: Path) -> None:
        """Adds what a YAML file sets.

        Raises:
          InputError: The file cannot be read or is no mapping, or a key stands twice.
        """
        keys: list[_Key] = []
        self._add(_read(_compose_file(path), "", str(path), keys), keys)

    def add_argument(self, argument: str) -> None:
        """Adds what an argument `name=value` sets.

        Raises:
          InputError: It has another form.
        """
        name, equals, text = argument.partition("=")
        if not equals or not name or name.startswith("-"):
            raise InputError(
                f"{COMMAND_LINE}: wanted CONFIG.yaml ... key=value ..., got '{argument}'; config "
                "files come first and end in .yaml, fields are set as key=value, and --help lists "
                "them"
            )
        if "[" in name:
            whole = name.partition("[")[0]
            raise InputError(f"{COMMAND_LINE}: {name}: wanted the whole list, {whole}='[...]'")
        node = self._compose_argument(name, text, argument)
        parts = name.split(".")
        keys = [_Key(".".join(parts[:end]), COMMAND_LINE) for end in range(1, len(parts))]
        keys.append(_key(name, COMMAND_LINE, node))
        layer = _read(node, name, COMMAND_LINE, keys)
        for part in reversed(parts):
            layer = {part: layer}
        self._add(layer, keys)

    def _compose_argument(self, name: str, text: str, argument: str) -> yaml.Node:
        """Node of an argument; what is not quoted and set for a text is one, whatever YAML says."""
        top, _, below = name.partition(".")
        stages = self._stages_of(top)
        cls, field = (stages[0], below) if stages else (self.cls, name)
        types = {info.name: info.type for info in iter_fields(cls)}
        plain = yaml.ScalarNode(f"{_TAG}str", text)
        is_text = types.get(field) in ("str", "str | null")
        if is_text and text not in ("", "~", "null") and text[0] not in "'\"":
            return plain
        try:
            return _compose(text, f"{COMMAND_LINE}: {name}", f"a value, got '{argument}'")
        except InputError:
            if top != SHARED:
                raise
            return plain  # who reads it says what it must be

    def check(self) -> None:
        """Raises InputError with all problems: of fields, and shared values that nothing reads."""
        names = [name for layer in self.shared if layer for name, _ in leaves({SHARED: layer})]
        for name in dict.fromkeys(names):
            dotted = name.replace("[", ".") + "."
            if not any(dotted.startswith(read.rstrip(".") + ".") for read in self._reads):
                near = difflib.get_close_matches(name, self._reads, n=1)
                hint = f"did you mean '{near[0]}'?" if near else "a typo?"
                place = self.where.get(name, COMMAND_LINE)
                self.problems.append(f"{place}: no field reads ${{{name}}}; {hint}")
        if self.problems:
            raise InputError("\n".join(self.problems))

    def _add(self, values: dict[Any, Any], keys: list[_Key]) -> None:
        for _, leaf in leaves(values):
            self._reads.update(_READ.findall(leaf) if isinstance(leaf, str) else ())
        for top, value in values.items():
            name = str(top)
            own = [key for key in keys if key.name == name or _is_below(key.name, name)]
            stages = self._stages_of(name)
            if name == SHARED and isinstance(value, dict):
                self.shared.append(value)
                self._place(own)
            elif stages and isinstance(value, dict):
                below = [key._replace(name=key.name[len(name) + 1 :]) for key in own[1:]]
                self._add_stage(stages, value, below, own[0].place)
            elif (suggestion := self._suggestion(name)) is not None:
                self.problems.append(f"{own[0].place}: unknown field '{name}'; {suggestion}")
            else:
                self._add_fields({top: value}, own)

    def _add_stage(
        self, stages: list[type], value: dict[Any, Any], keys: list[_Key], place: str
    ) -> None:
        """Adds a section that holds for some stages; it is checked for all of them."""
        where = {key.name: key.place for key in keys} | {"": place}
        if self.cls in stages:
            self._add_fields(value, keys)
        for cls in stages:
            if cls is not self.cls:
                found = find_problems(cls, value, where, root=cls)
                self.problems += [text for text in found if text not in self.problems]

    def _add_fields(self, values: dict[Any, Any], keys: list[_Key]) -> None:
        self.layers.append(values)
        self._place(keys)
        self.problems += find_problems(self.cls, values, self.where, root=self.cls)

    def _place(self, keys: list[_Key]) -> None:
        for key in keys:
            if not key.is_section:
                for old in [old for old in self.where if _is_below(old, key.name)]:
                    del self.where[old]
                    self.texts.pop(old, None)
            self.where[key.name] = key.place
            self.texts.pop(key.name, None)
            if key.text is not None:
                self.texts[key.name] = key.text

    def _stages_of(self, name: str) -> list[type]:
        """The stages that a top-level name such as "sft, reward" lists; empty for another name."""
        names = [part.strip() for part in name.split(",")]
        known = all(part in self._stages for part in names)
        return [self._stages[part] for part in names] if known else []

    def _suggestion(self, name: str) -> str | None:
        """Did-you-mean of a name that resembles a stage or `shared` more than a field."""
        fields, others = list(field_types(self.cls)), [*self._stages, SHARED]
        if name in fields:
            return None
        wrong = [part for part in map(str.strip, name.split(",")) if part not in self._stages]
        if not wrong or name == SHARED:
            return "wanted a mapping below it, such as {seed: 1}"
        near = difflib.get_close_matches(wrong[0], fields + others, n=1)
        if near and near[0] in others:
            return f"did you mean '{name.replace(wrong[0], near[0])}'?"
        return None


def _compose_file(path: Path) -> yaml.MappingNode:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: wanted a readable YAML config, got: {reason}; check the path"
        ) from error
    if len(text) > _LONGEST_FILE:
        raise InputError(
            f"{path}: wanted a config of at most {_LONGEST_FILE} characters, got {len(text)}"
        )
    root = _compose(text, str(path), "valid YAML, got")
    if isinstance(root, yaml.MappingNode):
        return root
    is_empty = root.tag == f"{_TAG}null"
    raise InputError(
        f"{_at(str(path), root)}: wanted a YAML mapping of config fields, `field: value`, got "
        + ("an empty file; leave it out to use the defaults" if is_empty else "something else")
    )


def _compose(text: str, source: str, wanted: str) -> yaml.Node:
    """Nodes of a YAML text from a file or the command line."""
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_node() or yaml.ScalarNode(f"{_TAG}null", "", loader.get_mark())
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None) or loader
        line = mark.line if mark else text[: getattr(error, "position", 0)].count("\n")
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        place = source if source.startswith(COMMAND_LINE) else f"{source}:{line + 1}"
        raise InputError(f"{place}: wanted {wanted}: {reason}") from error


def _read(node: yaml.Node, name: str, source: str, keys: list[_Key], depth: int = 0) -> Any:
    """Plain value of a node; adds every key and item below it to `keys`, parents first."""
    place = _at(source, node)
    if len(keys) > _MOST_KEYS or depth > _DEEPEST:
        raise InputError(
            f"{place}: {name[:80]}: wanted at most {_MOST_KEYS} values, nested {_DEEPEST} deep, "
            "got more; is an alias such as *name inside what it names, or repeated too often?"
        )
    if isinstance(node, yaml.ScalarNode):
        return _read_scalar(node, f"{place}: {name}")
    if node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
        raise InputError(f"{place}: {name}: wanted plain values, got the YAML tag {node.tag}")
    if isinstance(node, yaml.MappingNode):
        return _read_mapping(node, name, source, keys, depth)
    values = []
    for index, item in enumerate(node.value):
        keys.append(_key(f"{name}[{index}]", _at(source, item), item))
        values.append(_read(item, keys[-1].name, source, keys, depth + 1))
    return values


def _read_mapping(
    node: yaml.MappingNode, name: str, source: str, keys: list[_Key], depth: int
) -> dict[str, Any]:
    """Values of a mapping, those of `<<` below its own; refuses a key that stands twice."""
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value in sorted(node.value, key=lambda pair: pair[0].tag != f"{_TAG}merge"):
        place, child = _at(source, key), join(name, str(key.value))
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{place}: {name}: wanted texts as keys, got a list or a mapping")
        if key.value in lines:
            raise InputError(
                f"{place}: key '{child}' wanted once, got twice "
                f"(first on line {lines[key.value]}); remove one of the two"
            )
        lines[key.value] = key.start_mark.line + 1
        if key.tag == f"{_TAG}merge":
            keys.append(_Key(child, place))
            for other in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
                merged = _read(other, name, source, keys, depth + 1)
                if not isinstance(merged, dict):
                    raise InputError(f"{place}: {child}: wanted mappings")
                values |= merged
            continue
        keys.append(_key(child, place, value))
        values[key.value] = _read(value, child, source, keys, depth + 1)
    return values


def _read_scalar(node: yaml.ScalarNode, where: str) -> Any:
    """The value as YAML types it."""
    try:
        value = _Loader.yaml_constructors[node.tag](_Loader(""), node)
        is_short = isinstance(value, int | float | None) and len(node.value) <= 300
        if not (is_short or isinstance(value, str)) or _UNWRITABLE.search(node.value):
            raise ValueError("wanted a text without NUL, a number of up to 300 digits or null")
        if len(node.value) > _LONGEST_VALUE or node.value.count("${") > _MOST_READS:
            raise ValueError(
                f"wanted at most {_LONGEST_VALUE} characters and {_MOST_READS} times ${{...}}"
            )
        if isinstance(value, str) and "${" in value:
            OmegaConf.create([value])  # checks its grammar
            _require_harmless(value)
    except (ValueError, LookupError, AttributeError, RecursionError, *_FAULTS) as error:
        reason = str(error).partition("\n")[0]
        got = f"{node.value[:80]!a} ({node.tag.removeprefix(_TAG)})"
        raise InputError(f"{where}: wanted a value, got {got}: {reason}") from error
    return value


def _require_harmless(text: str) -> None:
    """Raises ValueError where ${...} does more than to read values and the environment."""
    read = text
    while (fewer := _INNERMOST.sub("x", read)) != read:  # a name may be made of values
        read = fewer
    for resolver in _RESOLVER.findall(read):
        if resolver != "oc.env":
            raise ValueError(f"wanted ${{NAME}} or ${{oc.env:NAME}}, got the resolver {resolver!r}")
    if _UNCLEAR.search(text):  # what it reads could not be told from how it is stored
        raise ValueError("wanted ${oc.env:NAME} of a plain name, and no two backslashes before ${")


def _key(name: str, place: str, value: yaml.Node) -> _Key:
    is_text = isinstance(value, yaml.ScalarNode) and value.tag != f"{_TAG}null"
    return _Key(name, place, isinstance(value, yaml.MappingNode), value.value if is_text else None)


def _at(source: str, node: yaml.Node) -> str:
    return source if source == COMMAND_LINE else f"{source}:{node.start_mark.line + 1}"


def _is_below(name: str, parent: str) -> bool:
    return name.startswith((parent + ".", parent + "["))

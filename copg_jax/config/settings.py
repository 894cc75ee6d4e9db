"""What files and arguments set, in order, and where each value stands.

A YAML file holds fields of a config, and under two kinds of other names:

- the names of stages, one or several (`sft, reward:`): fields that hold for these stages only, so
  that one file serves the whole pipeline;
- `shared`: values of any name, which fields read as `${shared.NAME}`. What nothing reads is
  refused, since it is a typo.

An argument `name=value` does the same for one value.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from copg_jax.config.schema import COMMAND_LINE, field_types, find_problems, join
from copg_jax.errors import InputError

SHARED = "shared"
_READ = re.compile(r"\$\{(" + SHARED + r"\.[\w.]*)")


class _Key(NamedTuple):
    """A key of a file or an argument."""

    name: str  # dotted
    place: str  # "file:line" or "command line"
    is_section: bool  # merges with what was set before; anything else replaces it


class Settings:
    """Layers of plain values for one config dataclass; interpolations are unresolved.

    Attributes:
      layers: Fields to merge, the last one wins.
      shared: Values below `shared` to merge, the last one wins.
      where: Dotted name to the place that set it last.
      problems: Unknown fields and wrong types so far.
    """

    def __init__(self, cls: type, stages: Mapping[str, type]) -> None:
        self.layers: list[dict[Any, Any]] = []
        self.shared: list[dict[Any, Any]] = []
        self.where: dict[str, str] = {}
        self.problems: list[str] = []
        self._cls = cls
        self._stages = stages
        self._reads: set[str] = set()

    def add_file(self, path: Path) -> None:
        """Adds what a YAML file sets.

        Raises:
          InputError: The file cannot be read or is no mapping, or a key stands twice.
        """
        text, root = _compose(path)
        keys = list(_keys(root, "", path))  # refuses what stands twice, which YAML would not
        self._add(_plain(text, str(path)), keys)

    def add_argument(self, argument: str) -> None:
        """Adds what an argument `name=value` sets.

        Raises:
          InputError: It has another form.
        """
        name, equals, _ = argument.partition("=")
        if not equals or not name or name.startswith("-"):
            raise InputError(
                f"{COMMAND_LINE}: wanted CONFIG.yaml ... key=value ..., got '{argument}'; config "
                "files come first and end in .yaml, fields are set as key=value, and --help lists "
                "them"
            )
        try:
            layer = OmegaConf.to_container(OmegaConf.from_dotlist([argument]), resolve=False)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            reason = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise InputError(
                f"{COMMAND_LINE}: {name}: wanted a value, got '{argument}': {reason}"
            ) from error
        assert isinstance(layer, dict)
        self._add(layer, list(_argument_keys(layer, "")))

    def check(self) -> None:
        """Raises InputError with all problems: of fields, and shared values that nothing reads."""
        merged = OmegaConf.to_container(OmegaConf.merge({}, *self.shared), resolve=False)
        for name, _ in leaves({SHARED: merged} if merged else {}):
            dotted = name.replace("[", ".") + "."
            if not any(dotted.startswith(read.rstrip(".") + ".") for read in self._reads):
                near = difflib.get_close_matches(name, self._reads, n=1)
                hint = f"did you mean '{near[0]}'?" if near else "a typo?"
                place = self.where.get(name, COMMAND_LINE)
                self.problems.append(f"{place}: no field reads ${{{name}}}; {hint}")
        if self.problems:
            raise InputError("\n".join(self.problems))

    def _add(self, values: dict[Any, Any], keys: list[_Key]) -> None:
        for text in _texts(values):
            self._reads.update(_READ.findall(text))
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
        if self._cls in stages:
            self._add_fields(value, keys)
        for cls in stages:
            if cls is not self._cls:
                found = find_problems(cls, value, where, root=cls)
                self.problems += [text for text in found if text not in self.problems]

    def _add_fields(self, values: dict[Any, Any], keys: list[_Key]) -> None:
        self.layers.append(values)
        self._place(keys)
        self.problems += find_problems(self._cls, values, self.where, root=self._cls)

    def _place(self, keys: list[_Key]) -> None:
        for key in keys:
            if not key.is_section:
                for old in [old for old in self.where if _is_below(old, key.name)]:
                    del self.where[old]
            self.where[key.name] = key.place

    def _stages_of(self, name: str) -> list[type]:
        """The stages that a top-level name such as "sft, reward" lists; empty for another name."""
        names = [part.strip() for part in name.split(",")]
        known = all(part in self._stages for part in names)
        return [self._stages[part] for part in names] if known else []

    def _suggestion(self, name: str) -> str | None:
        """Did-you-mean of a name that resembles a stage or `shared` more than a field."""
        fields, others = list(field_types(self._cls)), [*self._stages, SHARED]
        if name in fields:
            return None
        wrong = [part for part in map(str.strip, name.split(",")) if part not in self._stages]
        if not wrong or name == SHARED:
            return "wanted a mapping below it, such as {seed: 1}"
        near = difflib.get_close_matches(wrong[0], fields + others, n=1)
        if near and near[0] in others:
            return f"did you mean '{name.replace(wrong[0], near[0])}'?"
        return None


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


def _compose(path: Path) -> tuple[str, yaml.MappingNode]:
    """Text and nodes of a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: wanted a readable YAML config, got: {reason}; check the path"
        ) from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or error
        raise InputError(f"{path}{line}: wanted valid YAML, got: {reason}") from error
    if root is None or root.tag == "tag:yaml.org,2002:null":
        raise InputError(
            f"{path}: wanted a YAML mapping of config fields, got an empty file; "
            "add fields or leave the file out to use the defaults"
        )
    if not isinstance(root, yaml.MappingNode):
        raise InputError(
            f"{path}:{root.start_mark.line + 1}: wanted a YAML mapping `field: value`, "
            f"got a {root.id}"
        )
    return text, root


def _plain(text: str, place: str) -> dict[Any, Any]:
    """Values of a YAML text, interpolations unresolved."""
    try:
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)  # pyright: ignore
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(f"{place}: {str(error).splitlines()[0]}") from error


def _keys(node: yaml.Node, name: str, path: Path) -> Iterator[_Key]:
    """Yield every key and list item below `node`, parents first; refuse a key given twice."""
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            child = join(name, str(key.value))
            if key.value in lines:
                raise InputError(
                    f"{path}:{line}: key '{child}' wanted once, got twice "
                    f"(first on line {lines[key.value]}); remove one of the two"
                )
            lines[key.value] = line
            yield _Key(child, f"{path}:{line}", isinstance(value, yaml.MappingNode))
            yield from _keys(value, child, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            child, line = f"{name}[{index}]", value.start_mark.line + 1
            yield _Key(child, f"{path}:{line}", isinstance(value, yaml.MappingNode))
            yield from _keys(value, child, path)


def _argument_keys(value: Any, name: str) -> Iterator[_Key]:
    """Yield every name that an argument sets, parents first."""
    children = value.items() if isinstance(value, dict) else []
    named = [(join(name, str(key)), child) for key, child in children]
    if isinstance(value, list):
        named = [(f"{name}[{index}]", child) for index, child in enumerate(value)]
    for child_name, child in named:
        yield _Key(child_name, COMMAND_LINE, isinstance(child, dict))
        yield from _argument_keys(child, child_name)


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in nested plain values."""
    return (leaf for _, leaf in leaves(value) if isinstance(leaf, str))


def _is_below(name: str, parent: str) -> bool:
    return name.startswith((parent + ".", parent + "["))

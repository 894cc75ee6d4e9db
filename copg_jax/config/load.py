"""Typed configs: from a YAML file and `key=value` arguments to frozen dataclasses.

1. Read the YAML file and the arguments, remembering file and line of every key.
2. Walk them beside the dataclass schema: unknown keys, wrong types, all reported together.
3. Merge schema, file and arguments (OmegaConf) and report required values that are missing.
4. Build the dataclasses from the inside out; a range error from `__post_init__` gets its path.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from copg_jax.config.schema import (
    COMMAND_LINE,
    field_types,
    find_problems,
    iter_fields,
    join,
    section_class,
)
from copg_jax.errors import InputError

T = TypeVar("T")


def load_config(
    cls: type[T], argv: Sequence[str] | None = None, *, description: str | None = None
) -> T:
    """Load `[CONFIG.yaml] key=value ...` into an instance of the config dataclass `cls`.

    `--help` lists every field and `--print-config` prints the resolved config; both exit with 0.

    Args:
      cls: Frozen dataclass; its fields and nested dataclasses are the schema.
      argv: Arguments without the program name; those of this process when None.
      description: What the program does, for `--help`; a script gives its `__doc__`.

    Raises:
      InputError: Unreadable file, unknown key, wrong type, missing value or value out of range.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(_help(cls, description))
        sys.exit(0)
    print_only = "--print-config" in arguments
    arguments = [argument for argument in arguments if argument != "--print-config"]

    layers: list[Any] = []
    problems: list[str] = []
    where: dict[str, str] = {}
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        is_override = "=" in arguments[0] and not Path(arguments[0]).is_file()
        if not is_override:
            layers.append(_read_yaml(Path(arguments.pop(0)), where))
            problems += find_problems(cls, layers[-1], where, root=cls)
    for argument in arguments:
        layers.append(_read_argument(argument, where))
        problems += find_problems(cls, layers[-1], where, root=cls)
    if problems:
        raise InputError("\n".join(problems))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), *layers)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise InputError("\n".join(_missing_text(cls, name) for name in missing))
        container = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:  # such as an interpolation of an absent key
        raise InputError(f"config: {str(error).splitlines()[0]}") from error
    config = _build(cls, container, "", where)
    if print_only:
        print(to_yaml(config), end="")
        sys.exit(0)
    return config


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, keys in the order of the dataclass fields."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def config_differences(a: Any, b: Any) -> list[str]:
    """Fields that differ between two configs, as "optim.learning_rate: 1e-06 -> 2e-05"."""
    left, right = dict(_leaves(a)), dict(_leaves(b))
    names = list(left) + [name for name in right if name not in left]
    return [
        f"{name}: {left.get(name, '(absent)')} -> {right.get(name, '(absent)')}"
        for name in names
        if name not in left or name not in right or left[name] != right[name]
    ]


def run_main(main: Callable[[T], object], cls: type[T], *, description: str | None) -> NoReturn:
    """Script entry point: load the config, run `main`, exit.

    The exit status is the int that `main` returns, else 0; 2 for bad input (its text on stderr, no
    traceback); 130 after Ctrl-C.
    """
    try:
        status = main(load_config(cls, description=description))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _read_yaml(path: Path, where: dict[str, str]) -> Any:
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
    _record_lines(root, "", path, where)
    return _plain(text, str(path))


def _record_lines(node: yaml.Node, name: str, path: Path, where: dict[str, str]) -> None:
    """Put "file:line" of every key below `node` into `where`; refuse a key given twice."""
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
            where[child] = f"{path}:{line}"
            _record_lines(value, child, path, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            where[f"{name}[{index}]"] = f"{path}:{value.start_mark.line + 1}"
            _record_lines(value, f"{name}[{index}]", path, where)


def _read_argument(argument: str, where: dict[str, str]) -> Any:
    name, equals, _ = argument.partition("=")
    if not equals or not name or name.startswith("-"):
        raise InputError(
            f"{COMMAND_LINE}: wanted [CONFIG.yaml] key=value ..., got '{argument}'; "
            "the config file comes first and ends in .yaml, fields are set as key=value, "
            "and --help lists them"
        )
    try:
        layer = OmegaConf.to_container(OmegaConf.from_dotlist([argument]), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(
            f"{COMMAND_LINE}: {name}: wanted a value, got '{argument}': {reason}"
        ) from error
    # The argument replaces the value from the file, and with it everything below.
    for key in [key for key in where if key == name or key.startswith((name + ".", name + "["))]:
        del where[key]
    where[name] = COMMAND_LINE
    return layer


def _plain(text: str, place: str) -> dict[Any, Any]:
    """Values of a YAML text, interpolations unresolved."""
    try:
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)  # pyright: ignore
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(f"{place}: {str(error).splitlines()[0]}") from error


def _missing_text(cls: type, name: str) -> str:
    known = {field.name: field for field in iter_fields(cls)}
    wanted = f"{known[name].type} ({known[name].help})" if name in known else "a value"
    return (
        f"{name}: wanted {wanted}, got nothing and there is no default; "
        f"add {name}=VALUE to the command line or set it in the YAML file"
    )


def _build(cls: type, values: Any, name: str, where: Mapping[str, str]) -> Any:
    """Make `cls` and its sections from plain values; range errors get path, file and line."""
    hints = field_types(cls)
    arguments = {}
    for key, value in values.items():
        nested, child = section_class(hints[key]), join(name, key)
        if nested is not None and isinstance(value, dict):
            value = _build(nested, value, child, where)
        elif nested is not None and isinstance(value, list):
            value = [_build(nested, v, f"{child}[{i}]", where) for i, v in enumerate(value)]
        arguments[key] = value
    try:
        return cls(**arguments)
    except InputError as error:
        text = join(name, str(error)) if name else str(error)
        field = text.split(maxsplit=1)[0].rstrip(":,")
        place = f"{where[field]}: " if field in where else ""
        raise InputError(place + text) from error


def _help(cls: type, description: str | None) -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    lines = [f"usage: {program} [CONFIG.yaml] [key=value ...] [--help] [--print-config]", ""]
    lines += [description.strip(), ""] if description else []
    lines += ["Later settings win: default, then CONFIG.yaml, then key=value.", ""]
    lines.append("Fields (type = default):")
    for field in iter_fields(cls):
        default = " (required)" if field.default == "VALUE" else f" = {field.default}"
        lines.append(f"  {field.name}: {field.type}{default}")
        lines += [f"      {field.help}"] if field.help else []
    return "\n".join(lines)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every leaf of a config or a nested mapping."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping) and (value or not name):
        for key, child in value.items():
            yield from _leaves(child, join(name, str(key)))
    elif isinstance(value, list | tuple) and value:
        for index, child in enumerate(value):
            yield from _leaves(child, f"{name}[{index}]")
    else:
        yield name, value

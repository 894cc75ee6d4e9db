"""Typed configs: from YAML files and `key=value` arguments to frozen dataclasses.

1. Read files and arguments from left to right (`settings.Settings`), remembering where every key
   stands; unknown keys and wrong types are reported together.
2. Merge them over the schema (OmegaConf), resolve `${...}`, check again, and report required values
   that are missing.
3. Build the dataclasses from the inside out; a range error from `__post_init__` gets its path.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from copg_jax.config.schema import (
    EnvironmentText,
    as_stored,
    as_written,
    field_types,
    find_problems,
    iter_fields,
    join,
    leaves,
    map_leaves,
    section_class,
)
from copg_jax.config.settings import SHARED, Settings
from copg_jax.config.stages import STAGES
from copg_jax.errors import InputError, for_terminal, hidden, hide

T = TypeVar("T")
_MOST_READS = 1000
_ENVIRONMENT = "${oc.env:"
_UNESCAPED = re.compile(r"(?<!\\)" + re.escape(_ENVIRONMENT))
_VARIABLE = re.compile(re.escape(_ENVIRONMENT) + r"(\w+)")
_INTERPOLATION = re.compile(r"\$\{([\w.\[\]]+)\}")  # an innermost one, of a name


def load_config(
    cls: type[T], argv: Sequence[str] | None = None, *, description: str | None = None
) -> T:
    """Load `CONFIG.yaml ... key=value ...` into an instance of the config dataclass `cls`.

    Later wins: sections merge, lists and single values are replaced. `--help` lists every field and
    `--print-config` prints the resolved config with the place of each value; both exit with 0.

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

    settings = read_settings(cls, arguments)
    config, raw = load_settings(settings)
    if print_only:
        print(_with_sources(to_yaml(config), raw, settings.where), end="")
        sys.exit(0)
    return config


def read_settings(cls: type, argv: Sequence[str]) -> Settings:
    """What the arguments of `load_config` set."""
    settings, arguments = Settings(cls, STAGES), list(argv)
    while arguments and _is_file(arguments[0]):
        settings.add_file(Path(arguments.pop(0)))
    for argument in arguments:
        settings.add_argument(argument)
    return settings


def load_settings(settings: Settings) -> tuple[Any, dict[str, Any]]:
    """The config, and the values of its fields and of `shared` as they are written."""
    settings.check()
    raw, resolved = _merge(settings.cls, settings)
    return _build(settings.cls, resolved, "", settings.where), raw


def _is_file(argument: str) -> bool:
    # os.path, since Path raises where a value is too long for a name.
    is_override = "=" in argument and not os.path.isfile(argument)
    return argument.endswith((".yaml", ".yml")) and not is_override


def _merge(cls: type, settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of all fields and of `shared`: as they are written, and fields only, resolved."""
    schema = OmegaConf.structured(cls)
    try:
        raw = _plain(OmegaConf.merge(schema, *settings.layers))
        raw[SHARED] = _plain(OmegaConf.merge({}, *settings.shared))
        _require_all(cls, raw)
        _require_few_reads(raw, settings.where)
        texts = _with_texts(raw, "", settings.texts)
        for variable in _VARIABLE.findall(str(texts)):
            hide(variable)
        plain = _resolve(texts)
        resolved = as_written(cls, _resolve(raw), plain)
        reads_environment = _ENVIRONMENT in str(texts)
        named = _resolve(map_leaves(_escape, texts)) if reads_environment else plain
        shown = _with_names(resolved, named)
        if problems := list(find_problems(cls, shown, settings.where, root=cls)):
            raise InputError("\n".join(problems))
        resolved = _with_names(_plain(OmegaConf.merge(schema, resolved)), named)
    except (OmegaConfBaseException, RecursionError, TypeError) as error:  # such as an absent key
        name, text = getattr(error, "full_key", None) or "", str(error).splitlines()[0]
        place = f"{settings.where.get(name, 'config')}: {name}: " if name else "config: "
        fix = "set it in one of the files or on the command line"
        fix += ", as those of configs/sizes and configs/losses do" * ("shared." in text)
        fix = "export it before the run" if "Environment variable" in text else fix
        raise InputError(hidden(f"{place}{text}; {fix}")) from error
    _require_all(cls, resolved)
    return raw, resolved


def _require_few_reads(raw: Mapping[str, Any], where: Mapping[str, str]) -> None:
    """Refuses values that read values that read values, until no machine can hold the result."""
    written = dict(leaves(raw))
    counts: dict[str, int] = {}

    def count(name: str) -> int:
        """How many values are read for this one, or all below it, through others too."""
        if name not in counts:
            counts[name] = 0  # meanwhile; OmegaConf refuses a circle
            inside = (f"{name}.", f"{name}[")
            names = [name] if name in written else [n for n in written if n.startswith(inside)]
            reads = [read for n in names for read in _INTERPOLATION.findall(str(written[n]))]
            counts[name] = sum(1 + count(read) for read in reads)
        return counts[name]

    for name in written:
        if count(name) > _MOST_READS:
            raise InputError(
                f"{where.get(name, 'config')}: {name}: wanted at most {_MOST_READS} values read as "
                f"${{...}}, also through each other, got {count(name)}"
            )


def _resolve(raw: dict[str, Any]) -> dict[str, Any]:
    """Fields alone: what this stage does not read of `shared` may stay open."""
    tree = OmegaConf.create(raw)
    nodes = {key: tree[key] for key in raw if key != SHARED}
    return {key: _plain(x, True) if OmegaConf.is_config(x) else x for key, x in nodes.items()}


def _escape(value: Any) -> Any:
    """A text that resolves to the names of environment variables, not to their values."""
    return _UNESCAPED.sub(r"\\\g<0>", value) if isinstance(value, str) else value


def _with_names(value: Any, named: Any) -> Any:
    """Plain values with every text that reads the environment as an `EnvironmentText`."""
    if isinstance(value, dict) and isinstance(named, dict):
        return {key: _with_names(child, named.get(key)) for key, child in value.items()}
    if isinstance(value, list) and isinstance(named, list) and len(value) == len(named):
        return [_with_names(*pair) for pair in zip(value, named, strict=True)]
    if isinstance(value, str) and isinstance(named, str) and _ENVIRONMENT in named:
        return EnvironmentText(value, named)
    return value


def _with_texts(value: Any, name: str, texts: Mapping[str, str]) -> Any:
    """Plain values with every scalar that has a text as this text."""
    if isinstance(value, dict):
        return {key: _with_texts(child, join(name, key), texts) for key, child in value.items()}
    if isinstance(value, list):
        return [_with_texts(item, f"{name}[{i}]", texts) for i, item in enumerate(value)]
    return texts.get(name, value)


def _plain(config: Any, resolve: bool = False) -> Any:
    return OmegaConf.to_container(config, resolve=resolve)


def _require_all(cls: type, values: Mapping[str, Any]) -> None:
    wanted = {field.name: f"{field.type} ({field.help})" for field in iter_fields(cls)}
    missing = [
        f"{name}: wanted {wanted.get(name, 'a value')}, got nothing and there is no default; "
        + ("" if "[" in name else f"add {name}=VALUE to the command line or ")
        + "set it in the YAML file"
        for name in sorted(name for name, value in leaves(values) if value == MISSING)
    ]
    if missing:
        raise InputError("\n".join(missing))


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, keys in the order of the dataclass fields; see `as_stored`."""
    return OmegaConf.to_yaml(OmegaConf.create(as_stored(config)))


def config_differences(a: Any, b: Any) -> list[str]:
    """Fields that differ between two configs, as "optim.learning_rate: 1e-06 -> 2e-05"."""
    left, right = (
        dict(leaves(config if isinstance(config, Mapping) else as_stored(config)))
        for config in (a, b)
    )
    names = list(left) + [name for name in right if name not in left]
    return [
        f"{name}: {left.get(name, '(absent)')} -> {right.get(name, '(absent)')}"
        for name in names
        if name not in left or name not in right or left[name] != right[name]
    ]


def run_main(main: Callable[[T], object], cls: type[T], *, description: str | None) -> NoReturn:
    """Script entry point: load the config, run `main`, exit.

    The exit status is the int that `main` returns, else 0; 2 for bad input (its text on stderr, no
    traceback), and where something inside asked for a status of 0; 130 after Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # for the time of the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        config = load_config(cls, description=description)
        try:
            status = main(config)
        except SystemExit as error:
            if error.code:
                raise
            raise InputError(
                "something that the run called ended Python with sys.exit(0), so that the run is "
                "not complete. Look for sys.exit, exit or quit in the functions that the config "
                "names and in what they import, and run the same command again."
            ) from error
    except InputError as error:
        print(f"error: {for_terminal(hidden(str(error)))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


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
        mentioned = [join(name, key) for key in hints if re.search(rf"\b{key}\b", str(error))]
        place = next((f"{where[name]}: " for name in [field, *mentioned] if name in where), "")
        raise InputError(place + text) from error


def _help(cls: type, description: str | None) -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    lines = [f"usage: {program} [CONFIG.yaml ...] [key=value ...] [--help] [--print-config]", ""]
    lines += [description.strip(), ""] if description else []
    lines += [
        "Files are read from left to right, then key=value; later wins: sections merge, lists and",
        "single values are replaced. In a file, what stands below the name of a stage",
        f"({', '.join(STAGES)}) holds for that stage, and values below",
        f"`{SHARED}` are read by fields as ${{{SHARED}.NAME}}. --print-config prints all values",
        "and where each comes from.",
        "",
    ]
    lines.append("Fields (type = default):")
    for field in iter_fields(cls):
        default = " (required)" if field.default == "VALUE" else f" = {field.default}"
        lines.append(f"  {field.name}: {field.type}{default}")
        lines += [f"      {field.help}"] if field.help else []
    return "\n".join(lines)


def _with_sources(text: str, raw: Mapping[str, Any], where: Mapping[str, str]) -> str:
    """YAML text with a comment behind each value: the place that set it, and what it reads."""
    lines, written = text.splitlines(), dict(leaves(raw))
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for name, line in _last_lines(root, ""):
        lines[line] += f"  # {_origin(name, written, where)}"
    return "\n".join(lines) + "\n"


def _last_lines(node: yaml.Node, name: str) -> Iterator[tuple[str, int]]:
    """Yield dotted name and last line of every value."""
    if isinstance(node, yaml.MappingNode) and node.value:
        for key, value in node.value:
            yield from _last_lines(value, join(name, str(key.value)))
    elif isinstance(node, yaml.SequenceNode) and node.value:
        for index, value in enumerate(node.value):
            yield from _last_lines(value, f"{name}[{index}]")
    else:
        yield name, node.end_mark.line


def _origin(name: str, written: Mapping[str, Any], where: Mapping[str, str]) -> str:
    """The place that set a value, then those of the values that it reads as ${...}."""
    sources: dict[str, str] = {}
    pending = [name]
    while pending:
        name = pending.pop(0)
        holder = name
        while holder and holder not in written:  # below something that is read as a whole
            holder = holder[: max(holder.rfind("."), holder.rfind("["), 0)]
        if not holder or holder not in where:
            return "default"
        sources.setdefault(name, where[holder])
        reads = [read + name[len(holder) :] for read in _reads(written[holder], written)]
        pending += [read for read in reads if read not in sources]
    own, *others = sources.items()
    return ", ".join([own[1], *(f"{read} from {place}" for read, place in others)])


def _reads(value: Any, written: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names in the ${...} of a text, inner ones first."""
    while isinstance(value, str) and (match := _INTERPOLATION.search(value)):
        yield match[1]
        value = value.replace(match[0], str(written.get(match[1], "")))

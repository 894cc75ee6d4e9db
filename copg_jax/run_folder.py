"""The output folder of a run: one run at a time, of one config and one content of its inputs.

1. `claim` checks what can be wrong with it before any work, and holds it until the run ends.
2. `check_inputs` compares the inputs with those that the run began with, also where it is complete.
3. `write_run_header` writes the resolved config, the versions and the hashes of the inputs, never
   over those of another run, and not where no work follows: it would speak of that work.
"""

import dataclasses
import logging
import os
import platform
import posixpath
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from glob import glob, has_magic
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import jax
import yaml
from etils import epath

import copg_jax
from copg_jax import distributed
from copg_jax.checksums import read_record, write_record
from copg_jax.config.load import config_differences, to_yaml
from copg_jax.config.schema import PATHS, environment_hashes, leaves
from copg_jax.disk import disk_errors
from copg_jax.distributed import is_main_process
from copg_jax.errors import Damaged, InputError
from copg_jax.files import bucket_errors, is_remote, write_text
from copg_jax.lock import hold
from copg_jax.runtime import signals_as_exits

log = logging.getLogger(__name__)

RECORDED_PACKAGES = (
    "jax jaxlib flax optax orbax-checkpoint grain numpy transformers tokenizers datasets"
)
_CONFIG_END = "...\n"  # YAML's end of a document: a config without it was cut short
_EXPORTS = ("model", "best", "adapter", "best_adapter")
_FOLDERS = (*_EXPORTS, "checkpoints", "rounds", "tokens", "tensorboard", "wandb")
_FILES = ("config.yaml", "versions.json", "inputs.json", "metrics.jsonl", "scored.json")
_FILES += ("evaluation.json", "generations.jsonl", "sampled.json", "prompts.jsonl", "tracker.json")


@contextmanager
def claim(output_dir: str, config: Any, *, may_differ: Sequence[str] = ()) -> Iterator[None]:
    """Checks the output folder and holds it while the body runs; of several processes, 0 does.

    In the body SIGTERM and SIGHUP end the process in order, as Ctrl-C does, and what the disk says
    is one InputError.

    Args:
        output_dir: folder of the run; made when absent.
        config: config dataclass of the run.
        may_differ: see `check_run_folder`.

    Raises:
        InputError: a folder that cannot be written, that overlaps with an input, that another run
            is writing or that another config began.
    """
    with bucket_errors(output_dir):
        folder = epath.Path(output_dir)
    check_run_folder(folder, config, may_differ=may_differ)  # before anything is written there
    with signals_as_exits() as before_exit, disk_errors(folder), ExitStack() as stack:
        with distributed.main_first(folder):
            if is_main_process():
                before_exit.append(stack.enter_context(_held(folder)))
        # What another run has written there until it let go counts as well.
        check_run_folder(folder, config, may_differ=may_differ)
        yield


@contextmanager
def _held(folder: epath.Path) -> Iterator[Callable[[], None]]:
    """Makes and holds the folder, which is left as it was where the run has written nothing; gives
    what lets it go.
    """
    is_new = not folder.exists()
    try:
        with ExitStack() as stack:
            with _named(folder):
                folder.mkdir(parents=True, exist_ok=True)
                # The first file in it: it can be written.
                let_go = stack.enter_context(hold(folder))
            yield let_go
    finally:
        if is_new and not is_remote(folder):
            with suppress(OSError):  # which says that it holds something
                Path(folder).rmdir()


@contextmanager
def _named(folder: epath.Path) -> Iterator[None]:
    """Turns what the file system says of an output folder into an InputError that names it."""
    try:
        with bucket_errors(folder):
            yield
    except InputError:
        raise
    except (OSError, ValueError) as error:  # such as a name that is too long, or holds a NUL
        raise InputError(
            f"output_dir {folder}: wanted a folder that can be written, got "
            f"{getattr(error, 'strerror', None) or error}. Fix: give another output_dir, or make "
            "this one writable."
        ) from error


def check_run_folder(
    output_dir: epath.PathLike, config: Any, *, may_differ: Sequence[str] = ()
) -> None:
    """Refuse a folder that no run can use, or that another run began, before any work.

    A folder with the same config is resumed.

    Args:
      output_dir: Folder of the run; need not exist.
      config: Config dataclass of the run.
      may_differ: Dotted prefixes that do not define the run, such as "log_every", "evaluation" or
        "rewards[i].num_workers".

    Raises:
      InputError: The folder overlaps with an input, holds a run with another config or what a run
        cannot replace, is no folder, or cannot be reached.
    """
    output_dir = epath.Path(output_dir)
    with _named(output_dir):
        _check_apart(output_dir, config)
        if output_dir.exists() and not output_dir.is_dir():
            raise InputError(
                f"output_dir {output_dir}: wanted a folder, got a file; "
                "give another output_dir or remove the file"
            )
        _check_names(output_dir)
    if (output_dir / "config.yaml").exists():
        _check_same_run(output_dir / "config.yaml", to_yaml(config), may_differ)
    # Written before any work, so that work without them says that they were lost.
    work = output_dir / "metrics.jsonl"
    for name in ("config.yaml", "inputs.json"):
        if work.exists() and not (output_dir / name).exists():
            raise InputError(
                f"{output_dir / name}: missing, though {work.name} is there: nothing says what "
                f"this run began with. Fix: restore the file, or {_new_run(output_dir)}."
            )


def _check_apart(output_dir: epath.Path, config: Any) -> None:
    """Refuses an output folder where a run would read what it writes, or change what it reads."""
    folder = _resolved(os.fspath(output_dir))
    for name, path in leaves(dataclasses.asdict(config)):
        is_path = name.rpartition(".")[2] == "path" and isinstance(path, str)
        if is_path and (_is_in(path, folder) or _takes_in(path, folder)):
            raise InputError(
                f"output_dir {output_dir}: wanted a folder apart from what the run reads, got one "
                f"that overlaps with {name} {path}: the run would read what it writes, or change "
                "what it reads. Fix: give a folder that is neither in it nor around it."
            )


def _is_in(path: str, folder: PurePath) -> bool:
    """Whether files that are read lie in an output folder."""
    found = [path] if is_remote(path) or os.path.exists(path) else glob(path, recursive=True)
    return any(_resolved(file).is_relative_to(folder) for file in found)


def _takes_in(path: str, folder: PurePath) -> bool:
    """Whether a folder or pattern that is read takes in the files of an output folder."""
    read = _resolved(path)
    if "**" in path:
        return folder.is_relative_to(_resolved(path.partition("**")[0]))
    if has_magic(path):
        names = ("", "metrics.jsonl", "config.yaml", "scored.json", "part-00000.parquet")
        return any((folder / name).match(str(read)) for name in names)
    return folder.is_relative_to(read)


def _resolved(path: str) -> PurePath:
    """Absolute, without `.`, `..` and symbolic links; the path of a bucket without `.` and `..`."""
    return PurePath(posixpath.normpath(path) if is_remote(path) else os.path.realpath(path))


def _check_names(folder: epath.Path) -> None:
    """Refuses a folder where what a run writes has the name of something that it cannot replace."""
    if is_remote(folder):
        return  # objects and folders of a bucket may share a name
    parts = [path.name for path in Path(folder).glob("part-*.parquet")]
    for name in (*_FOLDERS, *_FILES, *parts):
        path = Path(folder) / name
        wanted = "a folder" if name in _FOLDERS else "a file"
        is_wanted = path.is_dir() if name in _FOLDERS else path.is_file()
        # An export takes the place of the folder before it as a whole.
        is_link = path.is_symlink() and (name in _EXPORTS or not path.exists())
        if is_link or (path.exists() and not is_wanted):
            got = "a symbolic link" if is_link else "a file" if path.is_file() else "a folder"
            raise InputError(
                f"output_dir {folder}: wanted {wanted} or nothing at {path}, got {got}. Fix: "
                "remove it, or give another output_dir."
            )


def check_inputs(output_dir: epath.PathLike, inputs: Mapping[str, str]) -> None:
    """Compares the inputs of a run, see `write_run_header`, with those that it began with, if it
    has begun; says where its versions.json is damaged.

    Raises:
      InputError: The run began with other inputs.
    """
    output_dir = epath.Path(output_dir)
    with distributed.main_first(output_dir):
        if is_main_process() and (output_dir / "inputs.json").exists():
            _check_same_inputs(output_dir / "inputs.json", inputs)
            try:
                fix = (
                    "What it said of earlier work is lost; work that is still to do is noted anew."
                )
                read_record(output_dir / "versions.json", fix=fix)
            except Damaged as error:
                log.warning("%s", error)


def write_run_header(output_dir: epath.PathLike, config: Any, inputs: Mapping[str, str]) -> None:
    """Write config.yaml, versions.json and inputs.json into `output_dir`; process 0 writes them.

    Called once the inputs are known to be good, so that a typo in them does not claim the folder.

    Args:
      output_dir: Folder of the run; made when absent.
      config: Config dataclass of the run.
      inputs: Name to hash of the models, data and rewards that the run reads. A file may change
        while its path, and so the config, stays the same.

    Raises:
      InputError: The run began with other inputs, or processes do not share `output_dir`.
    """
    output_dir = epath.Path(output_dir)
    path = output_dir / "inputs.json"
    inputs = {**inputs, **environment_hashes(config)}
    with distributed.main_first(path):
        if not is_main_process():
            return
        if path.exists():
            _check_same_inputs(path, inputs)
        output_dir.mkdir(parents=True, exist_ok=True)
        write_text(output_dir / "config.yaml", to_yaml(config) + _CONFIG_END)
        write_record(output_dir / "versions.json", _versions())
        write_record(path, inputs)


def _check_same_inputs(path: epath.Path, inputs: Mapping[str, str]) -> None:
    previous = read_record(path, fix=f"Fix: restore it, or {_new_run(path.parent)}.")
    changed = [name for name in inputs if previous.get(name) != inputs[name]]
    if changed:
        raise InputError(
            f"output_dir {path.parent} holds a run that began with another content of: "
            f"{', '.join(changed)} (hashes in {path.name}); going on would mix the two. Fix: "
            f"{_new_run(path.parent)}, or restore what it began with"
        )


def _check_same_run(path: epath.Path, resolved: str, may_differ: Sequence[str]) -> None:
    try:
        text = path.read_text(encoding="utf-8")
        previous = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"{path}: wanted the config of an earlier run, could not read it ({error}). Fix: "
            f"restore it, or {_new_run(path.parent)}."
        ) from error
    if not (isinstance(previous, dict) and text.endswith(_CONFIG_END)):
        raise InputError(
            f"{path}: damaged: cut short, or not written by a run of this version. Fix: restore "
            f"it, or {_new_run(path.parent)}."
        )
    # Both sides are read back from YAML, so that 1e-06 and 1.0e-06 are the same number.
    pair = previous, yaml.safe_load(resolved)
    changed = {_field(line) for line in config_differences(*map(_with_whole_paths, pair))}
    lines = [line for line in config_differences(*pair) if _field(line) in changed]
    allowed = [line for line in lines if any(_is_under(_field(line), p) for p in may_differ)]
    refused = [line for line in lines if line not in allowed]
    if refused:
        raise InputError(
            f"output_dir {path.parent} holds another run; its {path.name} differs (theirs -> "
            "yours):\n  " + "\n  ".join(refused) + f"\nFix: {_new_run(path.parent)}"
        )
    for line in allowed:
        log.info("%s: goes on with another %s", path.parent, line)


def _new_run(folder: epath.Path) -> str:
    return f"set another output_dir, or delete {folder} to start over"


def _with_whole_paths(value: Any, name: str = "") -> Any:
    """The same config with absolute paths, so that `./a`, `a` and `~/a` can be compared."""
    if isinstance(value, dict):
        return {key: _with_whole_paths(child, key) for key, child in value.items()}
    if isinstance(value, list):
        return [_with_whole_paths(child) for child in value]
    is_path = name in PATHS and isinstance(value, str)
    return str(_resolved(os.path.expanduser(value))) if is_path else value


def _field(difference: str) -> str:
    return difference.split(": ", 1)[0]


def _is_under(name: str, prefix: str) -> bool:
    name = re.sub(r"\[\d+\]", "[i]", name)
    return name == prefix or name.startswith((prefix + ".", prefix + "["))


def _versions() -> dict[str, Any]:
    versions: dict[str, Any] = {
        "copg_jax": copg_jax.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
    }
    for package in RECORDED_PACKAGES.split():
        versions[package] = metadata.version(package)
    versions["platform"] = jax.default_backend()
    versions["device_kind"] = jax.devices()[0].device_kind
    versions["device_count"] = jax.device_count()
    versions["process_count"] = jax.process_count()
    return versions


def _git_commit() -> str | None:
    """Commit of the source tree, with "+changes" when tracked files differ; None outside git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()

"""What a run needs from the process around it.

1. `setup`: logging, the persistent compilation cache, and the other processes of the run;
   `check_platform` for the accelerator that was asked for, `keep_freed_memory` for steps on CPUs.
2. `check_run_folder` and `write_run_header`: the resolved config and the versions, on disk before
   any work, and never over those of another run.
3. `GracefulExit`: SIGTERM and SIGINT become a flag that the loop reads between two steps.
"""

import ctypes
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import yaml
from etils import epath

import copg_jax
from copg_jax import distributed
from copg_jax.checksums import read_record, write_record
from copg_jax.config.load import config_differences, to_yaml
from copg_jax.distributed import is_main_process
from copg_jax.errors import InputError
from copg_jax.files import bucket_errors, write_text

log = logging.getLogger(__name__)

_PROGRESS_SEC = 15.0
_MALLOPT = {  # of malloc.h
    -4: 0,  # M_MMAP_MAX: take large pieces from the heap
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: leave what is free at its end
    -8: 1,  # M_ARENA_MAX: one heap for all threads; others cannot hold large pieces
}

_CONFIG_END = "...\n"  # YAML's end of a document: a config without it was cut short

RECORDED_PACKAGES = (
    "jax jaxlib flax optax orbax-checkpoint grain numpy transformers tokenizers datasets"
)


class Progress:
    """Logs how far a long piece of work is, at most every 15 seconds; silent where it is short.

    Args:
      name: What is done.
      total: Number of items.
    """

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._start = self._last = time.monotonic()

    def update(self, done: int) -> None:
        """Note that `done` items are finished."""
        now = time.monotonic()
        if now - self._last >= _PROGRESS_SEC and done:
            self._last = now
            left = (now - self._start) / done * (self._total - done)
            log.info("%s: %d of %d, %.0f s left", self._name, done, self._total, left)


def setup(mode: str = "off") -> None:
    """Set up logging and the persistent compilation cache, and join the processes of the run.

    The environment variable JAX_COMPILATION_CACHE_DIR moves the cache; the default is
    `~/.cache/copg_jax/xla`.

    Args:
      mode: See `distributed.start`.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    keep_freed_memory()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path.home() / ".cache" / "copg_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    index = distributed.start(mode)
    check_platform()
    logging.getLogger("copg_jax").setLevel(logging.WARNING if index else logging.INFO)
    if jax.distributed.is_initialized():
        log.info("process 0 of %d, %d devices", jax.process_count(), jax.device_count())


def check_platform() -> None:
    """Refuse to compute on a CPU where JAX_PLATFORMS names an accelerator first.

    JAX leaves `cuda` out of `cuda,cpu` where it sees no GPU, without a word. Of a device that is
    there and does not start it says so itself.

    Raises:
      InputError: The accelerator is not there.
    """
    names = os.environ.get("JAX_PLATFORMS", "")
    wanted = names.split(",")[0]
    try:
        got = jax.default_backend()
    except AssertionError:  # no name is left
        got = "nothing"
    if wanted not in ("", "cpu") and got in ("cpu", "nothing"):
        raise InputError(
            f"JAX_PLATFORMS={names}: wanted {wanted}, got {got}. Fix: see that the device and its "
            "driver are there (nvidia-smi lists a GPU); or compute on the CPU, with "
            "JAX_PLATFORMS=cpu."
        )


def keep_freed_memory() -> None:
    """Where all is computed on CPUs, have glibc keep the memory of a step for the next one.

    A step's temporary arrays are allocated anew each time. glibc would map such large pieces and
    unmap them afterwards, and the kernel clear every page again: 12 % of a step's time. To be
    called before JAX starts its threads; does nothing beside an accelerator or another libc.
    """
    if any(map(find_spec, ("libtpu", "jax_plugins"))) and os.environ.get("JAX_PLATFORMS") != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in _MALLOPT.items():
            mallopt(option, value)


class GracefulExit:
    """Turns SIGTERM and SIGINT into a flag: the loop saves and leaves after the current step.

    `requested` is None, "SIGTERM" or "SIGINT". A second signal ends the process at once.
    Outside the `with` block the previous handlers are back.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """0 when nothing was requested, else the shell's 128 + signal: 143 or 130."""
        return 128 + signal.Signals[self.requested] if self.requested else 0

    def __enter__(self) -> Self:
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # os.write and os._exit: neither allocates locks nor waits for threads of a pending save.
        if self.requested is not None:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nsecond signal: exit\n")
            os._exit(128 + signum)
        self.requested = signal.Signals(signum).name
        message = f"\n{self.requested}: saving after this step; send it again to exit at once\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())


def check_run_folder(
    output_dir: epath.PathLike, config: Any, *, may_differ: Sequence[str] = ()
) -> None:
    """Refuse the folder of another run, before any work; a folder with the same config is resumed.

    Args:
      output_dir: Folder of the run; need not exist.
      config: Config dataclass of the run.
      may_differ: Dotted prefixes that do not define the run, such as "log_every" or "evaluation".

    Raises:
      InputError: The folder holds a run with another config, is no folder, or cannot be reached.
    """
    output_dir = epath.Path(output_dir)
    with bucket_errors(output_dir):  # also where nothing is there yet
        is_file = output_dir.exists() and not output_dir.is_dir()
    if is_file:
        raise InputError(
            f"output_dir {output_dir}: wanted a folder, got a file; "
            "give another output_dir or remove the file"
        )
    if (output_dir / "config.yaml").exists():
        _check_same_run(output_dir / "config.yaml", to_yaml(config), may_differ)
    # Written before any work, so that work without them says that they were lost.
    for name in ("config.yaml", "inputs.json"):
        work = output_dir / "metrics.jsonl"
        if work.exists() and not (output_dir / name).exists():
            raise InputError(
                f"{output_dir / name}: missing, though {work.name} is there: nothing says what "
                f"this run began with. Fix: restore the file, or {_new_run(output_dir)}."
            )


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
    with distributed.main_first(path):
        if not is_main_process():
            return
        if path.exists():
            _check_same_inputs(path, inputs)
        output_dir.mkdir(parents=True, exist_ok=True)
        write_text(output_dir / "config.yaml", to_yaml(config) + _CONFIG_END)
        write_text(output_dir / "versions.json", json.dumps(_versions(), indent=2) + "\n")
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
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
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
    differences = [
        line
        for line in config_differences(previous, yaml.safe_load(resolved))
        if not any(_is_under(line.split(": ", 1)[0], prefix) for prefix in may_differ)
    ]
    if differences:
        raise InputError(
            f"output_dir {path.parent} holds another run; its {path.name} differs (theirs -> "
            "yours):\n  " + "\n  ".join(differences) + f"\nFix: {_new_run(path.parent)}"
        )


def _new_run(folder: epath.Path) -> str:
    return f"set another output_dir, or delete {folder} to start over"


def _is_under(name: str, prefix: str) -> bool:
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

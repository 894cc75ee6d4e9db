"""Services that show the numbers of runs, behind one adapter: TensorBoard, wandb and trackio.

metrics.jsonl is written in any case, and has everything. A service gets the same numbers by their
step. Whether it is online is its own setting: `WANDB_MODE=offline` keeps a run on this disk, and
trackio keeps runs there anyway.
"""

import logging
import os
import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Protocol

from etils import epath

from copg_jax.checksums import read_record, write_record
from copg_jax.errors import Damaged, InputError
from copg_jax.files import is_remote

log = logging.getLogger(__name__)

FILE_NAME = "tracker.json"

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_PROJECT = "copg_jax"


class Tracker(Protocol):
    """An open run of a service."""

    def log(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Takes what was logged at a step."""
        ...

    def close(self) -> None:
        """Sends or writes what is left."""
        ...


def require_tracker(name: str) -> None:
    """Raises InputError, before any work, where the package of a tracker is not installed."""
    package = _PACKAGES.get(name)
    try:
        is_there = package is None or find_spec(package) is not None
    except ValueError:  # marked as absent in sys.modules
        is_there = False
    if not is_there:
        raise InputError(
            f"training.tracker={name}: wanted the package {package}, which is not installed. Fix: "
            f"pip install 'copg_jax[{name}]', or training.tracker=none."
        )


def open_tracker(
    name: str, folder: epath.Path, settings: Mapping[str, Any], resume_step: int | None
) -> Tracker | None:
    """Opens the run of a service; None for "none".

    Args:
        name: one of `TRACKERS` of the config's sections.
        folder: of the run; its last part names it, and its tracker.json holds the id of the run
            of the service, in which a resumed run goes on.
        settings: the config, as a file may keep it.
        resume_step: last step done, None for a fresh start.

    Raises:
        InputError: the service's package is not installed, or the service refuses.
    """
    require_tracker(name)
    if name == "none":
        return None
    try:
        return _OPENERS[name](folder, settings, resume_step)
    except Exception as error:  # each service fails in its own way: no login, no network
        raise InputError(
            f"training.tracker={name}: wanted to begin a run there, got {type(error).__name__}: "
            f"{error}. Fix: log in, or set WANDB_MODE=offline for wandb, or training.tracker=none."
        ) from error


class _TensorBoard:
    def __init__(self, folder: epath.Path, settings: Mapping[str, Any], resume_step: int | None):
        from tensorboardX import SummaryWriter

        # TensorBoard hides the events from purge_step on that an interrupted run wrote.
        purge = 0 if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        for name, value in texts.items():
            self._writer.add_text(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: epath.Path, settings: Mapping[str, Any], resume_step: int | None):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=folder.name,
            id=_run_id(folder, resume_step),
            resume="allow",
            dir=None if is_remote(folder) else str(folder),
            config=dict(settings),
        )
        # A step may be logged twice after an interruption, which wandb's own counter refuses.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        self._run.log({"step": step, **numbers, **texts})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, folder: epath.Path, settings: Mapping[str, Any], resume_step: int | None):
        import trackio  # pyright: ignore[reportMissingImports]

        self._markdown = trackio.Markdown
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=f"{folder.name}-{_run_id(folder, resume_step)}",
            config=dict(settings),
            resume="allow",
            embed=False,
        )

    def log(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        shown = {name: self._markdown(text) for name, text in texts.items()}
        self._run.log({**numbers, **shown}, step=step)

    def close(self) -> None:
        self._run.finish()


_OPENERS = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}


def _run_id(folder: epath.Path, resume_step: int | None) -> str:
    """That in the folder, so that a resumed run is found again; a new one for a fresh start."""
    path = folder / FILE_NAME
    if resume_step is not None and path.exists():
        try:
            return read_record(path, wanted=["id"], fix="The run goes on in a new one there.")["id"]
        except Damaged as error:
            log.warning("%s", error)
    found = secrets.token_hex(8)
    write_record(path, {"id": found})
    return found

"""Trackers: each service gets the numbers of metrics.jsonl, offline too, and a missing package is
named before any work.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from copg_jax import trackers
from copg_jax.config.sections import TRACKERS
from copg_jax.errors import InputError
from copg_jax.tracking import MetricsLogger

LOGGED = [(1, {"loss": 1.0}, {"sample": "words"}), (2, {"loss": 0.5}, {})]


def log_all(folder, name, **options):
    folder.mkdir(exist_ok=True)
    with MetricsLogger(folder, total_steps=2, quiet=True, tracker=name, **options) as logger:
        for step, numbers, texts in LOGGED:
            logger.log(step, numbers, text=texts)


class Service:
    """What wandb and trackio have in common, and what they were told."""

    def __init__(self):
        self.begun, self.rows, self.finished = [], [], 0
        self.Markdown = lambda text: text

    def init(self, **options):
        self.begun.append(options)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, row, step=None):
        self.rows.append(row if step is None else {"step": step, **row})

    def finish(self):
        self.finished += 1


@pytest.fixture
def service(monkeypatch):
    found = Service()
    for name in ("wandb", "trackio"):
        module = SimpleNamespace(init=found.init, Markdown=found.Markdown, __spec__=True)
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_tensorboard_gets_the_same_numbers(tmp_path):
    log_all(tmp_path, "tensorboard")
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes() and b"words" in events.read_bytes()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_the_numbers_by_step_the_settings_and_the_end(service, tmp_path, name):
    log_all(tmp_path / "run", name, settings={"seed": 3})
    assert service.rows == [{"step": step, **n, **texts} for step, n, texts in LOGGED]
    (begun,) = service.begun
    assert begun["config"] == {"seed": 3} and begun["project"] == "copg_jax"
    assert begun["name"].startswith("run") and service.finished == 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_in_the_same_run_of_a_service_and_others_do_not(
    service, tmp_path, name
):
    for folder in ("a", "a", "b"):
        log_all(tmp_path / folder, name)
    key = "id" if name == "wandb" else "name"
    first, again, other = (begun[key] for begun in service.begun)
    assert first == again != other
    assert all(begun["resume"] == "allow" for begun in service.begun)


@pytest.mark.parametrize("name", [name for name in TRACKERS if name != "none"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name):
    package = {"tensorboard": "tensorboardX"}.get(name, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError) as caught:
        trackers.require_tracker(name)
    assert f"training.tracker={name}: wanted the package {package}" in str(caught.value)
    assert f"pip install 'copg_jax[{name}]'" in str(caught.value)


def test_a_service_that_refuses_is_one_error_with_a_way_out(service, monkeypatch, tmp_path):
    def init(**options):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(InputError, match=r"api_key not configured.*WANDB_MODE=offline"):
        log_all(tmp_path, "wandb")


OFFLINE = """
import json, sys
from etils import epath
from copg_jax.trackers import open_tracker
name, folder = sys.argv[1:]
for resume in (None, 1):
    tracker = open_tracker(name, epath.Path(folder), {"seed": 3}, resume)
    for step, numbers, texts in json.loads(sys.stdin.readline()):
        tracker.log(step, numbers, texts)
    tracker.close()
"""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.oracle(name)) for name in ("wandb", "trackio")]
)
def test_the_real_service_keeps_a_run_on_this_disk_without_a_network(tmp_path, name):
    environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "PATH": ""}
    run = tmp_path / "run"
    run.mkdir()
    answer = subprocess.run(
        [sys.executable, "-c", OFFLINE, name, str(run)],
        input=2 * f"{json.dumps(LOGGED)}\n",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    place, pattern = {"wandb": (run, "**/*.wandb"), "trackio": (tmp_path, "trackio/*.db")}[name]
    files = list(place.glob(pattern))
    assert files and all(b"loss" in file.read_bytes() for file in files)

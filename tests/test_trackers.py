"""Trackers: each service gets the numbers of metrics.jsonl, offline too, and a missing package is
named before any work.
"""

import json
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

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


@pytest.mark.parametrize(("resume_step", "begin"), [(None, 0), (2, 3)])
def test_tensorboard_hides_what_an_interrupted_run_wrote_of_steps_that_are_done_again(
    tmp_path, resume_step, begin
):
    log_all(tmp_path, "tensorboard", resume_step=resume_step)
    (file,) = (tmp_path / "tensorboard").iterdir()
    raw, starts = file.read_bytes(), []
    while raw:  # a record: size and checksum of 4 bytes, event and checksum of 4 bytes
        (size,) = struct.unpack("<Q", raw[:8])
        event = Event.FromString(raw[12 : 12 + size])
        starts += [event.step] if event.session_log.status == SessionLog.START else []
        raw = raw[16 + size :]
    assert starts == [begin]  # from where on TensorBoard leaves out earlier events


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
    begins = [("a", None), ("a", 1), ("a", 2), ("b", None), ("a", None), ("a", 1)]
    for folder, resume_step in begins:
        log_all(tmp_path / folder, name, resume_step=resume_step)
    runs = [begun["id" if name == "wandb" else "name"] for begun in service.begun]
    assert [runs.index(run) for run in runs] == [0, 0, 0, 3, 4, 4]
    assert all(begun["resume"] == "allow" for begun in service.begun)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_runs_of_one_path_on_two_machines_are_two_runs_of_a_service(service, tmp_path, name):
    for _ in range(2):
        log_all(tmp_path / "run", name)
        shutil.rmtree(tmp_path / "run")
    one, other = (begun["id" if name == "wandb" else "name"] for begun in service.begun)
    assert one != other


@pytest.mark.parametrize("change", [lambda text: text.replace('"id": "', '"id": "0'), lambda _: ""])
def test_a_run_whose_id_is_damaged_goes_on_in_a_new_run_and_says_so(
    service, tmp_path, caplog, change
):
    log_all(tmp_path, "wandb")
    file = tmp_path / "tracker.json"
    file.write_text(change(file.read_text()))
    for resume_step in (1, 2):
        log_all(tmp_path, "wandb", resume_step=resume_step)
    first, again, last = (begun["id"] for begun in service.begun)
    assert first != again == last
    assert f"{file}: damaged" in caplog.text and "goes on in a new one" in caplog.text


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

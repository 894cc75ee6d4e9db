"""The loop: interrupted and resumed is uninterrupted; non-finite steps; what is saved when."""

import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from copg_jax.config.sections import TrainingConfig
from copg_jax.errors import InputError
from copg_jax.runtime import make_pause
from copg_jax.tracking import MetricsLogger
from copg_jax.train import loop
from copg_jax.train import metrics as train_metrics
from copg_jax.train.checkpoint import Checkpoints
from copg_jax.train.metrics import LateMetrics, NonFiniteLoss
from copg_jax.train.state import TrainState
from tests.toys import Toy, assert_trees_equal, leaves, mesh, names_all, toy_batches

METRIC = "eval/reward_mean"
STEPS = 7


def reward_of(params: Any, step: int) -> tuple[dict[str, float], dict[str, str]]:
    """Stands in for generation: best at step 2, so that the newest is not the best."""
    value = float(np.asarray(params["w"]).sum())
    return {METRIC: 10.0 - (step - 2) ** 2, "eval/sum": value}, {"sample/0": f"{value:.3f}"}


def train(
    folder: Path,
    *,
    sizes: tuple[int, int, int] = (1, 1, 1),
    evaluate: loop.Evaluate | None = reward_of,
    spoil: Callable[[Iterator[Any]], Iterator[Any]] = iter,
    watch: Callable[[loop.StepFn], loop.StepFn] = lambda step_fn: step_fn,
    more_hooks: Sequence[loop.Hook] = (),
    **options: Any,
) -> TrainState:
    """Starts or resumes a run of the toy problem, as the stages do."""
    toy = Toy(mesh(*sizes))
    config = TrainingConfig(**{"eval_every": 2, "save_every": 3} | options)
    with Checkpoints(folder / "checkpoints", best_metric=METRIC) as checkpoints:
        start = checkpoints.latest_step or 0
        state = checkpoints.restore(start, toy.abstract, toy.layout) if start else toy.state
        with MetricsLogger(
            folder, total_steps=STEPS, quiet=True, resume_step=start or None
        ) as logger:
            evaluation = evaluate and loop.EvaluationHook(config, STEPS, evaluate, logger, METRIC)
            saving = loop.CheckpointHook(config, STEPS, checkpoints, logger, evaluation)
            hooks = [*([evaluation] if evaluation else []), saving, *more_hooks]
            is_done = start > 0 and checkpoints.is_evaluated(start)
            return loop.run(
                watch(lambda step, state, batch: toy.step(state, batch)),
                state,
                spoil(toy_batches(STEPS, start)),
                range(start + 1, STEPS + 1),
                mesh=toy.mesh,
                metrics=LateMetrics(logger, checkpoints.folder, toy.mesh, None),
                hooks=hooks,
                first_hooks=() if is_done else hooks,
            )


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "time" and not k.startswith("perf/")}
        for line in text
    ]


def signal_at(step: int, number: int = signal.SIGTERM) -> Callable[..., Iterator[Any]]:
    """Sends this process a signal while the batch of `step` is fetched."""

    def spoil(batches: Iterator[Any]) -> Iterator[Any]:
        for ids, batch in batches:
            if ids[0].startswith(f"step{step}-"):
                os.kill(os.getpid(), number)
            yield ids, batch

    return spoil


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, leaves(train(folder))


def test_every_step_is_logged_and_evaluations_come_before_the_first_step_and_after_the_last(whole):
    logged = lines(whole[0])
    assert [row["step"] for row in logged if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in logged if METRIC in row] == [0, 2, 4, 6, 7]
    assert all({"optim/grad_norm", "loss", "step"} <= row.keys() for row in logged if "loss" in row)
    assert all("sample/0" in row["text"] for row in logged if METRIC in row)
    raw = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()]
    assert all(row["perf/tokens_per_sec"] > 0 for row in raw if "loss" in row)


def test_the_loss_goes_down_and_the_last_and_the_best_state_are_saved(whole):
    folder, state = whole
    losses = [row["loss"] for row in lines(folder) if "loss" in row]
    assert losses[-1] < losses[0]
    toy = Toy()
    with Checkpoints(folder / "checkpoints", best_metric=METRIC) as checkpoints:
        assert checkpoints.best() == (2, 10.0)
        assert checkpoints.latest_step == STEPS
        assert_trees_equal(checkpoints.restore(STEPS, toy.abstract, toy.layout), state)
        best = checkpoints.restore(2, toy.abstract, toy.layout)
    (row,) = [row for row in lines(folder) if row["step"] == 2 and METRIC in row]
    assert row["eval/sum"] == float(np.asarray(best.params["w"]).sum())


@pytest.mark.parametrize("step", [1, 3, 4, STEPS])
def test_a_run_that_sigterm_interrupts_and_resumes_is_the_uninterrupted_one_bit_for_bit(
    whole, tmp_path, step, capfd
):
    with pytest.raises(SystemExit) as caught:
        train(tmp_path, spoil=signal_at(step))
    assert caught.value.code == 143
    assert f"SIGTERM: saved step {step} of {STEPS}" in capfd.readouterr().out
    state = train(tmp_path)
    assert_trees_equal(state, whole[1])
    assert lines(tmp_path) == lines(whole[0])
    with Checkpoints(tmp_path / "checkpoints", best_metric=METRIC) as checkpoints:
        assert checkpoints.best() == (2, 10.0)


def leaves_while_evaluating(at: int, number: int) -> tuple[loop.Evaluate, list[int]]:
    """An evaluation of five batches, and a signal in the second one at step `at`."""
    pause, begun = make_pause(mesh()), []

    def evaluate(params: Any, step: int) -> tuple[dict[str, float], dict[str, str]]:
        for batch in range(5):
            begun.append(step)
            if (step, batch) == (at, 1):
                os.kill(os.getpid(), number)
            pause()
        return reward_of(params, step)

    return evaluate, begun


@pytest.mark.parametrize(
    ("at", "number", "code"),
    [
        (0, signal.SIGTERM, 143),
        (2, signal.SIGTERM, 143),
        (4, signal.SIGINT, 130),
        (6, signal.SIGHUP, 129),
        (STEPS, signal.SIGTERM, 143),
    ],
)
def test_a_run_leaves_an_evaluation_at_the_next_batch_and_owes_it(
    whole, tmp_path, at, number, code, capfd
):
    evaluate, begun = leaves_while_evaluating(at, number)
    with pytest.raises(SystemExit) as caught:
        train(tmp_path, evaluate=evaluate)
    assert caught.value.code == code
    assert begun.count(at) == 2
    saved = f"saved step {at} of {STEPS}" if at else "nothing to save yet"
    assert f"{signal.Signals(number).name}: {saved}\n" in capfd.readouterr().out
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step == (at or None)
        assert at == 0 or not checkpoints.is_evaluated(at)
    assert [row for row in lines(tmp_path) if METRIC in row and row["step"] == at] == []
    assert_trees_equal(train(tmp_path), whole[1])
    assert lines(tmp_path) == lines(whole[0])


def test_a_hangup_saves_and_leaves_unless_it_is_ignored(whole, tmp_path):
    with pytest.raises(SystemExit) as caught:
        train(tmp_path / "cut", spoil=signal_at(3, signal.SIGHUP))
    assert caught.value.code == 129
    assert_trees_equal(train(tmp_path / "cut"), whole[1])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        assert_trees_equal(train(tmp_path / "on", spoil=signal_at(3, signal.SIGHUP)), whole[1])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_save_that_fails_in_the_background_is_noticed_at_the_next_step(tmp_path, monkeypatch):
    started: list[int] = []

    def watch(step_fn: loop.StepFn) -> loop.StepFn:
        def noted(step: int, state: TrainState, batch: Any) -> Any:
            started.append(step)
            return step_fn(step, state, batch)

        return noted

    save = Checkpoints.save

    def failing(self: Checkpoints, step: int, *arguments: Any, **options: Any) -> None:
        save(self, step, *arguments, **options)
        if step == 2:
            # What the thread that saves leaves behind.
            self._manager.wait_until_finished()
            self._manager._finalize_thread.get_not_none().exception = OSError(28, "full")

    monkeypatch.setattr(Checkpoints, "save", failing)
    with pytest.raises(OSError, match="full"):
        train(tmp_path, watch=watch, evaluate=None, save_every=2)
    assert started == [1, 2, 3]


def test_saving_says_nothing_of_its_own(tmp_path, caplog):
    train(tmp_path)
    assert [record for record in caplog.records if record.name == "absl"] == []


def test_a_run_that_is_killed_without_notice_goes_on_from_the_last_checkpoint(whole, tmp_path):
    def dies(batches: Iterator[Any]) -> Iterator[Any]:
        for ids, batch in batches:
            if ids[0].startswith("step6-"):
                raise KeyboardInterrupt  # no Exception: nothing is saved on the way out
            yield ids, batch

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, spoil=dies)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step == 3
    assert_trees_equal(train(tmp_path), whole[1])
    assert lines(tmp_path) == lines(whole[0])


def test_ctrl_c_saves_and_exits_with_130_and_the_handlers_are_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as caught:
        train(tmp_path, spoil=signal_at(3, signal.SIGINT))
    assert caught.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_resumes_on_another_mesh(whole, tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, spoil=signal_at(3))
    state = train(tmp_path, sizes=(1, 8, 1))
    for got, wanted in zip(leaves(state), whole[1], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def infinite_at(step: int, rows: list[int]) -> Callable[..., Iterator[Any]]:
    """Puts infinite rewards into some rows of one batch."""

    def spoil(batches: Iterator[Any]) -> Iterator[Any]:
        for ids, batch in batches:
            if ids[0].startswith(f"step{step}-"):
                batch.reward[rows, 0] = np.inf
            yield ids, batch

    return spoil


@pytest.mark.parametrize("step", [4, 5, STEPS])
def test_a_loss_that_is_not_finite_stops_with_step_and_ids_and_the_last_good_state(tmp_path, step):
    with pytest.raises(NonFiniteLoss) as caught:
        train(tmp_path, spoil=infinite_at(step, [2, 6]))
    folder = tmp_path / "checkpoints"
    wanted = [f"step {step}:", f"step{step}-row2, step{step}-row6.", str(folder), "learning_rate"]
    names_all(str(caught.value), wanted)
    assert "row3" not in str(caught.value)
    good = tmp_path / "good"
    with pytest.raises(SystemExit):
        train(good, spoil=signal_at(step - 1))
    toy = Toy()
    states = []
    for run in (tmp_path, good):
        with Checkpoints(run / "checkpoints") as checkpoints:
            assert checkpoints.latest_step == step - 1
            states.append(checkpoints.restore(step - 1, toy.abstract, toy.layout))
    assert_trees_equal(*states)
    assert [row["step"] for row in lines(tmp_path) if "loss" in row][-1] == step


def test_a_run_stopped_by_a_bad_batch_goes_on_once_the_batch_is_good(whole, tmp_path):
    with pytest.raises(NonFiniteLoss):
        train(tmp_path, spoil=infinite_at(4, [0]))
    assert_trees_equal(train(tmp_path), whole[1])
    assert lines(tmp_path) == lines(whole[0])


def test_an_evaluation_that_fails_leaves_a_checkpoint_and_is_made_up_for(whole, tmp_path):
    def failing(params: Any, step: int) -> Any:
        if step == 4:
            raise InputError("reward function down")
        return reward_of(params, step)

    with pytest.raises(InputError, match="reward function down"):
        train(tmp_path, evaluate=failing)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step == 4
    assert_trees_equal(train(tmp_path), whole[1])
    assert lines(tmp_path) == lines(whole[0])


def test_data_that_fail_leave_every_step_that_was_done_saved_and_logged(whole, tmp_path):
    def unreadable(batches: Iterator[Any]) -> Iterator[Any]:
        for ids, batch in batches:
            if ids[0].startswith("step6-"):
                raise InputError("disk gone")
            yield ids, batch

    with pytest.raises(InputError, match="disk gone"):
        train(tmp_path, spoil=unreadable)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step == 5
    assert_trees_equal(train(tmp_path), whole[1])
    assert lines(tmp_path) == lines(whole[0])


class Watched:
    """A metric that notes when the host waits for it or reads it."""

    def __init__(self, value: Any, note: Callable[[], None]) -> None:
        self.value, self.note = value, note

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        self.note()
        return np.asarray(self.value)

    def block_until_ready(self) -> Any:
        self.note()
        return self


def test_a_step_is_read_after_the_next_batch_was_fetched_and_the_next_step_started(tmp_path):
    events: list[str] = []

    def watch(step_fn: loop.StepFn) -> loop.StepFn:
        def watched_step(step: int, state: TrainState, batch: Any) -> Any:
            events.append(f"start {step}")
            state, metrics = step_fn(step, state, batch)
            loss = Watched(metrics["loss"], lambda: events.append(f"read {step}"))
            return state, metrics | {"loss": loss}

        return watched_step

    def watched_batches(batches: Iterator[Any]) -> Iterator[Any]:
        for step, batch in enumerate(batches, 1):
            events.append(f"fetch {step}")
            yield batch

    train(tmp_path, watch=watch, spoil=watched_batches, evaluate=None, save_every=STEPS)
    wanted = ["fetch 1", "start 1"]
    for step in range(2, STEPS + 1):
        wanted += [f"fetch {step}", f"start {step}", f"read {step - 1}"]
    assert events == [*wanted, f"read {STEPS}"]


def test_every_process_ranks_its_checkpoints_by_the_reward_of_process_0(tmp_path, monkeypatch):
    # Where this process finds a reward, process 0 finds minus as much.
    monkeypatch.setattr(
        loop.distributed, "from_main", lambda value: value if np.ndim(value) else -value
    )
    train(tmp_path)
    with Checkpoints(tmp_path / "checkpoints", best_metric=METRIC) as checkpoints:
        assert checkpoints.best() == (STEPS, 15.0)


def test_without_an_evaluation_only_the_last_states_are_kept(whole, tmp_path):
    assert_trees_equal(train(tmp_path, evaluate=None), whole[1])
    assert not [row for row in lines(tmp_path) if METRIC in row]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        str(STEPS - 1),
        str(STEPS),
    ]


def test_an_evaluation_without_a_reward_is_never_the_best(tmp_path):
    def none_known(params: Any, step: int) -> Any:
        return {METRIC: math.nan if step != 4 else 1.0}, {}

    train(tmp_path, evaluate=none_known, save_every=2)
    with Checkpoints(tmp_path / "checkpoints", best_metric=METRIC) as checkpoints:
        assert checkpoints.best() == (4, 1.0)


class Noted:
    """A hook of a user's own, at every third step, that notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.asked = 0

    def is_due(self, step: int) -> bool:
        return step % 3 == 0

    def raise_failure(self) -> None:
        self.asked += 1

    def __call__(self, step: int, state: TrainState) -> None:
        assert int(state.step) == step
        self.calls.append(("reach", step))

    def leave(self, step: int, state: TrainState) -> None:
        assert int(state.step) == step
        self.calls.append(("leave", step))


def test_hooks_are_called_where_any_is_due_and_told_where_a_run_stops_before_its_time(tmp_path):
    whole, cut = Noted(), Noted()
    train(tmp_path / "whole", more_hooks=[whole])
    # Its own steps are 0, 3 and 6; evaluations are at 2, 4 and 6, and the last step is 7.
    assert whole.calls == [("reach", step) for step in (0, 2, 3, 4, 6, 7)]
    assert whole.asked == STEPS
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", more_hooks=[cut], spoil=signal_at(3))
    assert cut.calls == [("reach", 0), ("reach", 2), ("leave", 3)]


def test_the_rates_of_steps_leave_out_the_evaluations_between_them(tmp_path, monkeypatch):
    seconds = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: seconds[0])
    monkeypatch.setattr(train_metrics, "time", clock)

    def slow(params: Any, step: int) -> Any:
        seconds[0] += 100.0
        return reward_of(params, step)

    def watch(step_fn: loop.StepFn) -> loop.StepFn:
        def timed(step: int, state: TrainState, batch: Any) -> Any:
            seconds[0] += 2.0
            return step_fn(step, state, batch)

        return timed

    train(tmp_path, evaluate=slow, watch=watch, eval_every=1)
    raw = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [row["perf/pairs_per_sec"] for row in raw if "loss" in row]
    assert rates == [8 / 2.0] * STEPS


def test_a_batch_that_microbatches_and_mesh_do_not_divide_is_refused_with_one_that_they_do():
    loop.check_batch(32, 2, mesh(2, 2, 2))
    with pytest.raises(InputError) as caught:
        loop.check_batch(12, 2, mesh(2, 2, 2))
    names_all(str(caught.value), ["training.batch_size", "multiple of", "2 x 4", "12", "8 or 16"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("num_epochs", 0),
        ("eval_every", -1),
        ("save_every", 0),
        ("log_every", 0),
        ("max_steps", 0),
        ("num_microbatches", 3),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(InputError, match=field):
        TrainingConfig(**{field: value})

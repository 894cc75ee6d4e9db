"""Checkpoints: the newest and the best are kept, any mesh restores, other models are refused."""

import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils.epath import gpath

from copg_jax.errors import InputError
from copg_jax.train import state as train_state
from copg_jax.train.checkpoint import Checkpoints
from tests.toys import Toy, assert_trees_equal, group_batch, leaves, mesh, names_all

METRIC = "eval/reward_mean"


@pytest.fixture
def trained() -> Toy:
    """A toy whose state is one step old, on eight devices."""
    toy = Toy(mesh(1, 8, 1))
    toy.state, _ = toy.step(toy.state, toy.place(group_batch(np.arange(16.0).reshape(8, 2))))
    return toy


def test_a_state_comes_back_bit_for_bit_on_the_same_and_on_other_meshes(tmp_path, trained):
    wanted = leaves(trained.state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, trained.state)
    for sizes in ((1, 8, 1), (2, 2, 2), (1, 1, 1)):
        layout = Toy(mesh(*sizes)).layout
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest_step == 1
            state = checkpoints.restore(1, trained.abstract, layout)
        assert_trees_equal(state, wanted)
        for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(layout), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_the_parameters_come_back_alone_on_another_mesh(tmp_path, trained):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, trained.state)
    layout = Toy(mesh(2, 2, 2)).layout
    with Checkpoints(tmp_path) as checkpoints:
        params = checkpoints.restore_params(1, trained.abstract, layout)
    assert_trees_equal(params, leaves(trained.state.params))
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(layout.params), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_saving_returns_before_the_state_may_be_donated(tmp_path, trained):
    wanted = leaves(trained.state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, trained.state)
        trained.step(trained.state, trained.place(group_batch(np.ones((8, 2)))))
    with Checkpoints(tmp_path) as checkpoints:
        assert_trees_equal(checkpoints.restore(1, trained.abstract, trained.layout), wanted)


def test_only_the_newest_two_are_kept_without_a_metric(tmp_path, trained):
    with Checkpoints(tmp_path) as checkpoints:
        for at in (1, 2, 3):
            checkpoints.save(at, trained.state)
        assert checkpoints.best() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_the_newest_two_and_the_best_by_the_metric_are_kept(tmp_path, trained):
    values = {1: 0.5, 2: 2.0, 3: 1.0, 4: None, 5: 1.5}
    with Checkpoints(tmp_path, best_metric=METRIC) as checkpoints:
        assert checkpoints.best() is None
        for at, value in values.items():
            checkpoints.save(at, trained.state, value)
        assert checkpoints.best() == (2, 2.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "5"]
    with Checkpoints(tmp_path, best_metric=METRIC) as checkpoints:  # and after a restart
        assert checkpoints.best() == (2, 2.0)
        assert checkpoints.latest_step == 5


def test_a_step_without_a_value_is_saved_without_a_warning_and_never_the_best(
    tmp_path, trained, caplog
):
    with Checkpoints(tmp_path, best_metric=METRIC) as checkpoints:
        for at, value in {1: None, 2: -3.0, 3: None, 4: float("nan"), 5: None}.items():
            checkpoints.save(at, trained.state, value)
        assert checkpoints.best() == (2, -3.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "5"]
    assert [line.message for line in caplog.records if line.levelname == "WARNING"] == []


def test_a_step_that_is_there_is_left_alone(tmp_path, trained):
    wanted = leaves(trained.state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, trained.state)
        checkpoints.save(1, jax.tree.map(jnp.zeros_like, trained.state))
    with Checkpoints(tmp_path) as checkpoints:
        assert_trees_equal(checkpoints.restore(1, trained.abstract, trained.layout), wanted)


@pytest.mark.parametrize("other", ["names", "shapes", "optimizer"])
def test_a_checkpoint_of_another_model_or_optimiser_is_refused(tmp_path, trained, other):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, trained.state)
    optimizer = optax.sgd(0.1, momentum=0.9) if other == "optimizer" else trained.optimizer
    name, size = ("v" if other == "names" else "w"), (16 if other == "shapes" else 8)
    shapes = {name: jax.ShapeDtypeStruct((size,), jnp.float32)}
    layout = train_state.state_shardings(trained.mesh, optimizer, shapes, {name: ("embed",)})
    abstract = train_state.abstract_state(optimizer, shapes)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(InputError, match=r"(?s)wanted a checkpoint of this model.*Fix: ") as caught,
    ):
        checkpoints.restore(1, abstract, layout)
    assert str(tmp_path / "1") in str(caught.value)


def test_the_arrays_of_another_layout_of_the_optimiser_are_named(tmp_path, trained):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, trained.state)
    # The same Adam, with its moments one level deeper: the layout of an earlier version, say.
    optimizer = optax.chain(optax.chain(optax.scale_by_adam()), optax.scale(-0.1))
    other = Toy(trained.mesh, optimizer=optimizer)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError) as caught:
        checkpoints.restore(1, other.abstract, other.layout)
    names_all(
        str(caught.value),
        [
            "opt_state.0.0.mu.w: wanted (8,), got nothing",
            "opt_state.0.mu.w: wanted nothing, got (8,)",
            "another output_dir",
        ],
    )
    assert "params.w" not in str(caught.value)


def test_a_state_that_halted_may_try_again_when_restored(tmp_path, trained):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, trained.state._replace(halted=jnp.bool_(True)))
    with Checkpoints(tmp_path) as checkpoints:
        assert not checkpoints.restore(1, trained.abstract, trained.layout).halted


def damage(folder) -> None:
    """Flips a bit of the largest file of a saved step: one of arrays."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def save_steps(folder, trained, values, **options) -> None:
    with Checkpoints(folder, **options) as checkpoints:
        for at, value in values.items():
            checkpoints.save(at, trained.state._replace(step=jnp.int32(at)), value)


def test_a_damaged_newest_step_is_set_aside_and_may_be_saved_again(tmp_path, trained, caplog):
    save_steps(tmp_path, trained, {1: None, 2: None})
    damage(tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 1
        assert int(checkpoints.restore(1, trained.abstract, trained.layout).step) == 1
        checkpoints.save(2, trained.state)
    names_all(caplog.text, ["damaged or changed", "damaged-2-0"])
    damage(tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:  # the folders set aside do not meet
        assert checkpoints.latest_step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "damaged-2-0", "damaged-2-1"]


@pytest.mark.parametrize("stray", ["emptied", "without checksums"])
def test_a_step_that_is_not_whole_is_no_step(tmp_path, trained, stray):
    save_steps(tmp_path, trained, {1: None})
    if stray == "emptied":
        (tmp_path / "7").mkdir()
    else:
        shutil.copytree(tmp_path / "1", tmp_path / "7")
        (tmp_path / "7" / "checksums.json").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 1


@pytest.mark.parametrize("number", [errno.ETIMEDOUT, errno.ESTALE, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("name", ["checksums.json", "default"])
def test_a_step_that_cannot_be_read_now_ends_the_run_and_stays(
    tmp_path, trained, monkeypatch, number, name
):
    save_steps(tmp_path, trained, {1: None, 2: None})

    def failing(method):
        def read(path, *arguments):
            if name in path.parts:
                raise OSError(number, os.strerror(number))
            return method(path, *arguments)

        return read

    for method in ("open", "read_bytes"):
        monkeypatch.setattr(
            gpath.PosixGPath, method, failing(getattr(gpath.PosixGPath, method)), raising=False
        )
    with pytest.raises(InputError, match=rf"2/.*{name}.*{os.strerror(number)}.*same command"):
        Checkpoints(tmp_path)
    monkeypatch.undo()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 2


def test_a_save_may_take_hours_until_it_is_sealed(tmp_path, monkeypatch):
    options = {}
    monkeypatch.setattr(ocp, "AsyncOptions", lambda **given: options.update(given))
    with Checkpoints(tmp_path):
        assert options["timeout_secs"] >= 2 * 3600


def test_a_run_without_a_whole_step_begins_anew_and_says_so(tmp_path, trained, caplog):
    save_steps(tmp_path, trained, {1: 3.0, 2: 1.0}, best_metric=METRIC)
    damage(tmp_path / "1")
    damage(tmp_path / "2")
    with Checkpoints(tmp_path, best_metric=METRIC) as checkpoints:
        assert checkpoints.latest_step is None and checkpoints.best() is None
    assert "no step is whole: the run goes on from its start" in caplog.text


@pytest.mark.parametrize("how", ["changed", "deleted"])
def test_a_damaged_best_step_is_named_and_the_run_goes_on(tmp_path, trained, caplog, how):
    save_steps(tmp_path, trained, {1: 3.0, 2: 1.0, 3: 2.0}, best_metric=METRIC)
    if how == "changed":
        damage(tmp_path / "1")
    else:
        shutil.rmtree(tmp_path / "1")
    for _ in range(2):  # each opening says so, until another one is the best
        caplog.clear()
        with Checkpoints(tmp_path, best_metric=METRIC) as checkpoints:
            assert checkpoints.latest_step == 3 and checkpoints.best() is None
        names_all(caplog.text, [f"{tmp_path}/1", "step 1, the best until step 3", "from here on"])
    assert (tmp_path / "damaged-1-0").exists() == (how == "changed")
    save_steps(tmp_path, trained, {4: 0.5}, best_metric=METRIC)
    caplog.clear()
    with Checkpoints(tmp_path, best_metric=METRIC) as checkpoints:
        assert checkpoints.best() == (4, 0.5)
    assert caplog.text == ""


def test_a_best_step_that_a_damaged_one_has_replaced_is_forgotten(tmp_path, trained):
    save_steps(tmp_path, trained, {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0}, best_metric=METRIC)
    assert not (tmp_path / "1").exists()
    damage(tmp_path / "4")
    for _ in range(2):  # also where the run is ended before it comes to step 4 again
        with Checkpoints(tmp_path, best_metric=METRIC) as checkpoints:
            assert checkpoints.latest_step == 3 and checkpoints.best() is None
    with Checkpoints(tmp_path, best_metric=METRIC) as checkpoints:
        with pytest.raises(InputError, match="wanted the checkpoint of step 1"):
            checkpoints.restore_params(1, trained.abstract, trained.layout)
        checkpoints.save(4, trained.state, 5.0)
        assert checkpoints.best() == (4, 5.0)


def test_a_step_gets_its_rank_without_being_written_again(tmp_path, trained):
    with Checkpoints(tmp_path, best_metric=METRIC) as checkpoints:
        checkpoints.save(1, trained.state, is_evaluated=False)
    arrays = {path: path.stat().st_mtime_ns for path in (tmp_path / "1" / "default").rglob("*")}
    with Checkpoints(tmp_path, best_metric=METRIC) as checkpoints:
        assert not checkpoints.is_evaluated(1)
        checkpoints.save(1, trained.state, 2.0)
    with Checkpoints(tmp_path, best_metric=METRIC) as checkpoints:
        assert checkpoints.is_evaluated(1) and checkpoints.best() == (1, 2.0)
    assert arrays == {p: p.stat().st_mtime_ns for p in (tmp_path / "1" / "default").rglob("*")}


def test_what_an_ended_save_has_left_is_removed(tmp_path, trained):
    save_steps(tmp_path, trained, {1: None})
    (tmp_path / "1").rename(tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, trained.state)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]

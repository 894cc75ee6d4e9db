"""Rounds of fresh samples: what they leave, what they train on, and that nothing compiles later."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from copg_jax import reuse, scoring
from copg_jax.data import sampled, scored
from copg_jax.data.group_list import read_folder
from copg_jax.hf import weights as hf_weights
from copg_jax.train.checkpoint import Checkpoints
from experiments.online import rounds_table
from tests.interrupted import compilations_by_round
from tests.workplace import Workplace

REWARDS = "rewards=[{function: copg_jax.rewards.length}]"
ROUNDS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Workplace]:
    """A base model; runs share what they compile."""
    place = Workplace(tmp_path_factory.mktemp("online"))
    with reuse.shared_by_runs():
        yield place


def arguments(place: Workplace, name: str, *more: str) -> list[str]:
    """Of a run of four rounds of a step of eight groups."""
    folder = place.folder
    own = [f"model.path={folder / 'base'}", REWARDS, "evaluation=null", f"rounds={ROUNDS}"]
    return [*own, f"output_dir={folder / name}", *more]


def run(place: Workplace, name: str, *more: str) -> list[dict[str, Any]]:
    """The lines of the rounds of a run in the folder of this name."""
    place.run("online", *arguments(place, name, *more))
    return [row for row in place.metrics(name) if "online/round" in row]


@pytest.fixture(scope="module")
def compiled(place) -> Counter[int]:
    """Compilations by round."""
    with compilations_by_round() as counts:
        run(place, "plain", "training.log_every=1")
    return counts


@pytest.fixture(scope="module")
def plain(place, compiled) -> Path:
    """A run of four rounds."""
    assert compiled
    return place.folder / "plain"


def scored_of(folder: Path, number: int) -> epath.Path:
    """The scored samples of a round."""
    return epath.Path(folder / "rounds" / f"{number:05d}" / "scored")


def test_nothing_is_compiled_after_the_first_round(compiled):
    assert compiled[0] >= 3  # the sampler, π_ref and the step
    assert {at: compiled[at] for at in range(1, ROUNDS)} == dict.fromkeys(range(1, ROUNDS), 0)


def test_each_round_is_drawn_by_the_policy_of_its_step_and_scored_by_the_first(place, plain):
    base = hf_weights.params_hash(place.folder / "base")
    hashes, prompts = [], Counter()
    for number in range(ROUNDS):
        folder = scored_of(plain, number)
        side_car = scored.read_side_car(folder)
        assert scoring.is_scored_to_its_end(folder) and side_car.reference_hash == base
        hashes.append(sampled.read_sampled(folder.parent / "samples").model_hash)
        groups = read_folder(folder)
        assert len(groups) == 8
        for group in groups:
            prompts[group.id] += 1
            assert group.mu_logps is not None and group.ref_logps is not None
            is_same = np.array_equal(group.mu_logps, group.ref_logps)
            assert is_same == (number == 0)
            # Another policy, but not by much: a step of 1e-2.
            np.testing.assert_allclose(group.mu_logps, group.ref_logps, atol=5)
    assert hashes[0] == base and len(set(hashes)) == ROUNDS
    # 24 prompts: three rounds have each once, and the fourth the first ones again.
    assert Counter(prompts.values()) == {1: 16, 2: 8}


def test_a_round_is_reported_with_its_samples_and_the_time_of_its_parts(place, plain):
    rows = [row for row in place.metrics("plain") if "online/round" in row]
    assert [(row["step"], row["online/round"]) for row in rows] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    for row in rows:
        groups = list(read_folder(scored_of(plain, int(row["online/round"]))))
        rewards = np.array([group.rewards for group in groups])
        gaps = [group.mu_logps - group.ref_logps for group in groups]  # pyright: ignore
        assert row["online/reward"] == pytest.approx(rewards.mean())
        assert row["online/ties"] == np.mean(rewards[:, 0] == rewards[:, 1])
        assert row["online/kl"] == pytest.approx(np.mean(gaps), abs=1e-6)
        wanted = rewards.mean() - 0.06 * np.mean(gaps)
        assert row["online/objective"] == pytest.approx(wanted, abs=1e-6)
        assert row["online/staleness"] == 0
        assert {"perf/sample_sec", "perf/score_sec", "perf/train_sec"} <= row.keys()
    assert rows[0]["online/kl"] == 0 != rows[1]["online/kl"]
    assert rounds_table(rows).row_count == ROUNDS
    assert rounds_table([*rows] * 100).row_count == 20


def test_the_first_step_is_that_of_score_and_train_policy_through_the_files(place, tmp_path):
    """One round whose groups are one batch: the same samples, scores and weights."""
    run(place, "one", "rounds=1")
    base, judged, trained = place.folder / "base", tmp_path / "judged", tmp_path / "trained"
    own = [f"data.path={place.folder / 'one' / 'rounds' / '00000' / 'samples'}"]
    all_of_it = ["data.part=all", "data.holdout_fraction=0", "data.max_rows=null"]
    place.run("score", f"reference.path={base}", *own, *all_of_it, REWARDS, f"output_dir={judged}")
    scored_rows = [list(read_folder(epath.Path(folder))) for folder in
                   (judged, scored_of(place.folder / "one", 0))]  # fmt: skip
    for one, other in zip(*scored_rows, strict=True):
        np.testing.assert_array_equal(one.rewards, other.rewards)
        np.testing.assert_array_equal(one.ref_logps, other.ref_logps)
    place.run("policy", f"model.path={base}", f"data.path={judged}", *all_of_it, "validation=null",
              "evaluation=null", "training.max_steps=1", f"output_dir={trained}")  # fmt: skip
    before, got, wanted = (
        load_file(folder / "model.safetensors")
        for folder in (base, place.folder / "one" / "model", trained / "model")
    )
    for name, value in wanted.items():
        moved = np.abs(value - before[name]).max()
        assert moved > 1e-3
        # Adam divides a gradient by its size: one that is rounding has any sign.
        close = np.isclose(got[name], value, atol=1e-5, rtol=0)
        assert close.mean() > 0.999, name


def test_replayed_rounds_are_those_of_before_and_the_staleness_counts_the_updates(place):
    settings = ["replay_rounds=2", "steps_per_round=2"]
    rows = run(place, "replay", *settings)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert rows[0]["online/staleness"] == 0.5  # 0 at its first step, 1 at its second
    # Of 16 groups half are two updates older.
    assert all(0.5 < row["online/staleness"] < 2.5 for row in rows[1:])
    assert {row["online/round"] for row in rows} == {0, 1, 2, 3}


def test_a_reset_makes_the_policy_its_reference_and_empties_the_buffer(place):
    name = "resets"
    rows = run(place, name, "reference_every=2", "replay_rounds=3", "keep_rounds=1")
    assert [row["online/kl"] == 0 for row in rows] == [True, False, True, False]
    assert [row["online/staleness"] for row in rows[::2]] == [0, 0]
    folder = place.folder / name
    kept = sorted(path.name for path in (folder / "rounds").iterdir())
    assert kept == ["00002", "00003"]  # a run that goes on at its last reset needs the third
    drawn = sampled.read_sampled(scored_of(folder, 2).parent / "samples")
    side_cars = [scored.read_side_car(scored_of(folder, number)) for number in (2, 3)]
    assert {side_car.reference_hash for side_car in side_cars} == {drawn.model_hash}
    # The last round's reference is the policy after two steps, which was saved.
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert 2 in checkpoints.newest

"""The studies that come with the project: each is a grid, and each arm is in its table."""

from pathlib import Path

import pytest
import yaml

from copg_jax.config.load import load_config
from copg_jax.config.schema import leaves
from experiments.generated.labels import shift_of_prompt
from experiments.quickstart import make_inputs
from experiments.studies.grid import Grid
from experiments.studies.study_config import StudyConfig

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


def first(value):
    """The first value of an axis, and of each of its branches."""
    if isinstance(value, dict):
        return {key: first(child) for key, child in value.items()}
    return value[:1] if isinstance(value, list) else [value]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_is_a_grid_whose_arms_are_in_their_table(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = yaml.safe_load(path.read_text())["grid"]
    few = {axis: own if axis == "shared.arm" else first(own) for axis, own in grid.items()}
    axes = yaml.safe_dump(few, default_flow_style=True, width=10_000).strip()
    study = load_config(StudyConfig, [str(path), f"grid={axes}"])
    points = Grid(study).points
    arms = [point.values.get("shared.arm") for point in points]
    assert len(points) == len(set(arms)) == len({point.name for point in points})
    tables = [yaml.safe_load(Path(file).read_text()).get("shared", {}) for file in study.configs]
    known = {name for table in tables for name in table.get("arms", {})}
    if "shared.arm" in grid:
        assert {arm for _, arm in leaves(grid["shared.arm"])} <= known


def test_labels_are_turned_round_for_the_share_that_was_asked(tmp_path):
    sizes = {"num_examples": 40, "num_comparisons": 400, "hidden_size": 16, "num_layers": 2}
    make_inputs(tmp_path, turned=[0, 25], **sizes)
    lines = {
        name: (tmp_path / "data" / f"comparisons{name}.jsonl").read_text().splitlines()
        for name in ("", "_0", "_25")
    }
    assert lines["_0"] == lines[""]
    turned = sum(a != b for a, b in zip(lines[""], lines["_25"], strict=True))
    assert 70 < turned < 130  # of 400; s.d. 8.7


def test_parts_of_the_comparisons_follow_each_other(tmp_path):
    sizes = {"num_examples": 40, "num_comparisons": 10, "hidden_size": 16, "num_layers": 2}
    make_inputs(tmp_path, **sizes)
    make_inputs(tmp_path, parts=3, **sizes)  # asked for later
    whole = (tmp_path / "data" / "comparisons.jsonl").read_text().splitlines()
    parts = [
        (tmp_path / "data" / f"comparisons_part_{part}.jsonl").read_text().splitlines()
        for part in (1, 2, 3)
    ]
    assert parts == [whole[:3], whole[3:6], whole[6:9]]  # one row is over


def test_the_shift_is_of_the_prompt_alone():
    a, b, c = shift_of_prompt(["x", "x", "y"], ["1", "2", "1"])
    assert a == b != c and -3 <= min(a, c) <= max(a, c) < 3

"""The Markdown table of plans: one row each, read from the lines that the planner prints."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from copg_jax.errors import InputError
from experiments import plan as script
from experiments.planning.plan import Plan

FITS: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Plan)) | {
    "topology": "gpu:8xh100",
    "stage": "policy",
    "model": "llama2_7b",
    "trained": "all weights",
    "num_microbatches": 4,
    "hbm_gib_per_chip": 72,
    "fits": True,
    "arguments_gib": 9.41,
    "temp_gib": 7.5,
    "frozen_gib": 0.0,
    "roofline_step_s": {"compute": 1.254, "hbm": 0.1, "interconnect": 0.2},
    "bound_by": "compute",
}
UNKNOWN = FITS | dict.fromkeys(("hbm_gib_per_chip", "fits", "roofline_step_s", "bound_by"))


def test_every_plan_in_a_file_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "plans.txt"
    rows = [FITS, UNKNOWN, FITS | {"fits": False, "frozen_gib": 80.0}]
    file.write_text("".join(f"{json.dumps(row)}\n One chip in one step\n\n" for row in rows))
    script.main(["--table", str(file)])
    head, rule, *found = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == found[0].count("|")
    first = "| gpu:8xh100 | llama2_7b | policy | all weights | 4 | "
    assert found == [
        f"{first}9.4 + 7.5 + 0.0 = 16.9 | 72 | yes | 1.25 (compute) |",
        f"{first}9.4 + 7.5 + 0.0 = 16.9 | - | - | - |",
        f"{first}9.4 + 7.5 + 80.0 = 96.9 | 72 | no | 1.25 (compute) |",
    ]


def test_a_file_without_plans_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"--table .*missing: wanted a file with plans"):
        script.main(["--table", str(tmp_path / "missing")])
    (tmp_path / "other").write_text("One chip in one step\n")
    with pytest.raises(InputError, match=r"wanted the JSON lines.*experiments.plan ... >>"):
        script.main(["--table", str(tmp_path / "other")])
    with pytest.raises(InputError, match="--table FILE: wanted nothing beside it"):
        script.main(["--table", str(tmp_path / "other"), "--topology", "cpu:8"])

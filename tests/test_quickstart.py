"""The quickstart: which runs it makes of its config, and that its tables say what was measured."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from copg_jax.config.stages import EvaluateConfig, SFTConfig
from copg_jax.errors import InputError
from experiments.quickstart import (
    QuickstartConfig,
    Stages,
    differences_table,
    policies_table,
    summary_of,
)
from experiments.studies.comparison import Policy, Trained

ONES = np.ones(4)
UNEVEN = np.array([0.4, 0.6, 0.4, 0.6])
SFT = Policy(np.array([0.0, 1.0, 2.0, 3.0]), 0 * ONES, 16 * ONES, ONES, 0 * ONES)
TRAINED = [
    Trained(
        "copg", 0.3, [], Policy(SFT.reward + 0.5, 1.25 * ONES, 15 * ONES, 0.5 * ONES, 0 * ONES)
    ),
    Trained("copg", 3.0, [], Policy(SFT.reward + 0.125, 0 * ONES, 16 * ONES, ONES, 0 * ONES)),
    Trained("dpo", 0.5, [], Policy(SFT.reward + UNEVEN, 2 * ONES, 14 * ONES, ONES, 0 * ONES)),
]


def test_each_method_is_trained_at_multiples_of_its_beta_in_folders_of_their_own():
    runs = dict(Stages(QuickstartConfig()).policies([10.0, 0.1, 1.0]))
    assert list(runs)[:3] == ["copg_beta_0.03", "copg_beta_0.3", "copg_beta_3"]
    assert [run.loss.name for run in runs.values()] == ["copg"] * 3 + ["dpo"] * 3 + ["ipo"] * 3
    for name, run in runs.items():
        assert run.output_dir == f"runs/quickstart/{name}"
        assert name == f"{run.loss.name}_beta_{run.loss.beta:g}"
        assert run.model.path == "runs/quickstart/sft/model"
        assert run.distributed == "off"


def test_all_runs_are_trained_and_evaluated_alike_but_for_loss_beta_and_folder():
    stages = Stages(QuickstartConfig())
    runs = [run for _, run in stages.policies([0.1, 1.0])]
    assert len({(repr(run.optim), repr(run.training), repr(run.evaluation)) for run in runs}) == 1
    evaluations = [
        stages.config(EvaluateConfig, "evaluate", f"shared.run={name}") for name in ("sft", "x")
    ]
    assert evaluations[0].evaluation == evaluations[1].evaluation
    assert evaluations[1].model.path == "runs/quickstart/x/model"
    assert evaluations[1].output_dir == "runs/quickstart/evaluate_x"


def test_overrides_reach_their_stage_only(tmp_path):
    config = QuickstartConfig(
        output_dir=str(tmp_path),
        overrides={"sft": ["training.max_steps=3"], "dpo": ["loss.beta=2.0"]},
    )
    stages = Stages(config)
    assert stages.config(SFTConfig, "sft").training.max_steps == 3
    assert stages.config(SFTConfig, "sft").output_dir == f"{tmp_path}/sft"
    names = list(dict(stages.policies([0.5, 1.0])))
    assert names[2:4] == ["dpo_beta_1", "dpo_beta_2"]
    assert all("_beta_2" not in name for name in names[:2])


@pytest.mark.parametrize("factors", [[], [1.0, -1.0], [0.0], [1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
def test_factors_that_give_no_picture_are_refused(factors):
    with pytest.raises(InputError, match="beta_factors: wanted one to four different numbers > 0"):
        QuickstartConfig(beta_factors=factors)


def test_the_summary_holds_what_the_table_shows():
    summary = json.loads(json.dumps(summary_of(TRAINED, SFT, 0.2)))
    assert (summary["num_prompts"], summary["objective_beta"]) == (4, 0.2)
    assert summary["sft_reward"]["mean"] == 1.5
    sft, copg, _, dpo = summary["policies"]
    assert (sft["method"], sft["beta"], sft["reward"]["mean"]) == ("sft", None, 0.0)
    assert (copg["method"], copg["beta"]) == ("copg", 0.3)
    assert copg["reward"] == {"mean": 0.5, "stderr": 0.0}
    assert copg["kl"] == {"mean": 1.25, "stderr": 0.0}
    assert copg["objective"]["mean"] == pytest.approx(0.5 - 0.2 * 1.25)
    assert (copg["length"], copg["eos_rate"]) == (15.0, 0.5)
    assert dpo["reward"]["mean"] == pytest.approx(0.5)
    assert dpo["reward"]["stderr"] == pytest.approx(0.2 / np.sqrt(3) / 2)
    reward, objective = summary["differences_at_best_beta"]
    assert (reward["of"], reward["first"]) == ("reward", {"method": "copg", "beta": 0.3})
    assert reward["difference"]["is_tie"] is True
    assert objective["of"] == "objective"
    assert objective["difference"]["mean"] == pytest.approx(0.25 - 0.1)
    assert objective["difference"]["is_tie"] is False


def shown(table) -> list[list[str]]:
    """Cells of a table as a console shows it, row by row."""
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    lines = [line for line in console.export_text().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_the_table_shows_paired_errors_the_objective_by_itself_and_the_best_beta_of_a_method():
    rows = shown(policies_table(TRAINED, SFT, 0.2))
    assert rows[0] == ["SFT", "", "0", "0.00", "0", "16.0", "1.00"]
    assert rows[1] == ["CoPG", "0.3", "0.500 ± 0.000*", "1.25", "0.250 ± 0.000*", "15.0", "0.50"]
    assert rows[2][1:5] == ["3", "0.125 ± 0.000", "0.00", "0.125 ± 0.000"]
    assert rows[3][:3] == ["DPO", "0.5", "0.500 ± 0.058*"]
    titles = [column.header for column in policies_table(TRAINED, SFT, 0.2).columns]
    assert "E[R] − 0.2·KL" in titles


def test_methods_that_cannot_be_told_apart_are_called_a_tie():
    rows = shown(differences_table(TRAINED, 0.2))
    assert rows == [
        ["reward", "CoPG 0.3 − DPO 0.5", "0.000 ± 0.058", "tie"],
        ["E[R] − 0.2·KL", "CoPG 0.3 − DPO 0.5", "0.150 ± 0.058", "by 2.6 standard errors"],
    ]

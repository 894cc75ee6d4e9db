"""The cost of the paper's sweep in docs/studies.md is what the program there prints."""

import yaml

from experiments.studies.axes import expand
from tests.pages import ROOT, examples, read

PAGE = ROOT / "docs" / "studies.md"


def test_the_table_of_chip_hours_is_what_its_program_prints(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (program,) = examples(PAGE)
    exec(compile(program, str(PAGE), "exec"), {"__name__": "studies"})
    assert f"|--:|\n{capsys.readouterr().out}\n" in read(PAGE)


def test_the_program_counts_the_runs_of_the_study():
    study = yaml.safe_load(read(ROOT / "configs" / "studies" / "tldr_llama2_7b.yaml"))
    (program,) = examples(PAGE)
    grid, best = expand(study["grid"]), study["best"]
    assert f"policies({len(grid)}, 128, 50)" in program
    num_methods = len({values["shared.loss"] for values in grid})
    assert f"policies({num_methods * len(best['seeds'])}, 1024, 100)" in program
    settings = " ".join(best["settings"])
    assert "training.eval_every=100" in settings and "num_prompts=1024" in settings

"""The examples in README and docs/ run as they stand."""

import ast
import json
import sys

import jax
import pytest

from copg_jax.config.load import load_config
from copg_jax.config.stages import PolicyConfig, ScoreConfig
from copg_jax.data.formats import columns
from copg_jax.errors import InputError
from copg_jax.objective import find_coefficients, find_objective
from copg_jax.rewards.functions import WeightedRewards
from tests.pages import PAGES, README, ROOT, blocks, commands, examples, write_files

RECIPES = ROOT / "docs" / "recipes.md"
# test_readme.py runs the program of the README.
WITH_EXAMPLES = [page for page in PAGES if page != README and examples(page)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder on the path, with the modules that the pages define, where `runs` is the reader's
    own; what they define is forgotten at the end."""
    for page in PAGES:
        write_files(page, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.name)
def test_python_blocks_run(page, folder):
    assert RECIPES in WITH_EXAMPLES
    with jax.numpy_rank_promotion("allow"):  # as a reader has it
        for text in examples(page):
            exec(compile(text, str(page), "exec"), {"__name__": page.stem})


def configs(cls: type, module: str, monkeypatch) -> list:
    """Configs of the commands of a script that name a function of the reader's own."""
    monkeypatch.chdir(ROOT)
    found = [command for command in commands() if command.after(module)]
    return [load_config(cls, c.after(module)) for c in found if "my_" in str(c)]


def test_the_command_of_the_objective_finds_it_with_its_numbers(folder, monkeypatch):
    (config,) = configs(PolicyConfig, "experiments.train_policy", monkeypatch)
    assert find_objective(config.loss).__module__ == "my_losses"
    assert find_coefficients(config.loss) == {"beta": config.loss.beta, "width": 2.0}
    with pytest.raises(InputError, match="width"):
        find_objective(type(config.loss)(name=config.loss.name))


def test_the_commands_of_the_rewards_find_functions_that_score(folder, monkeypatch):
    polite, scores = sorted(
        configs(ScoreConfig, "experiments.score", monkeypatch), key=lambda c: "scores" in str(c)
    )
    monkeypatch.chdir(folder)
    row = {"prompt": "Parcel?", "completions": ["please wait", "no"], "scores": [4.0, 0.5]}
    (folder / "runs").mkdir()
    (folder / "runs" / "scores.jsonl").write_text(json.dumps(row) + "\n")
    texts = ["Parcel?"] * 3, [" please wait", " no", " never heard of"]
    total, parts = WeightedRewards(polite.rewards)(*texts, {}, num_tokens=[3] * 3)
    assert parts["says_please"].tolist() == [1, 0, 0]
    assert total.tolist() == pytest.approx([0.98, -0.01, -0.03])
    total, _ = WeightedRewards(scores.rewards)(*texts, {}, num_tokens=[3] * 3)
    assert total[:2].tolist() == [4.0, 0.5]
    assert total[2] != total[2]  # unknown: left out


def test_the_row_format_of_the_recipe_is_read_once_it_is_in_its_place(monkeypatch):
    (text,) = [t for t in blocks(RECIPES, "python") if t.startswith("# copg_jax/data/formats/")]
    *functions, entry = ast.parse(text).body
    assert isinstance(entry, ast.Expr)
    names = dict(vars(columns))
    exec(compile(ast.Module(functions, []), str(RECIPES), "exec"), names)
    schema = eval(compile(ast.Expression(entry.value), str(RECIPES), "eval"), names)
    row = {"prompt": "Parcel?", "ranked": ["on its way", "wait", "no"]}
    with pytest.raises(columns.InvalidRow, match="ranked"):
        columns.to_group("rows.jsonl:1", row)
    monkeypatch.setattr(columns, "SCHEMAS", (schema, *columns.SCHEMAS))
    group = columns.to_group("rows.jsonl:1", row)
    assert group.completions == ("on its way", "wait", "no")
    assert group.rewards == (0.0, -1.0, -2.0)
    assert group.columns == {}

"""Rows that bring rewards of their own along: `score` keeps them, alone or beside computed ones,
and `train_policy` trains on them.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from etils import epath

from copg_jax.config.load import load_config
from copg_jax.config.stages import EvaluateConfig, PolicyConfig, ScoreConfig
from copg_jax.data import scored
from copg_jax.data.tokenizer import load_tokenizer
from copg_jax.errors import InputError
from experiments import evaluate, score, train_policy
from experiments.generated import write_generated
from tests.toys import names_all
from tests.workplace import tiny_model

GIVEN = "copg_jax.rewards.given"
PROMPTS = ("Name a colour.", "Name an animal.", "Name a town.", "Name a fruit.")
OWN = [(0.9, 0.2), (7.5, 3.0), (0.1, 0.4), (1.0, 2.0)]
SCORE_NAMES = ["score_{}", "{}_score", "reward_{}", "{}_reward"]
seen: dict[str, list[Any]] = {}


def by_column(
    prompts: list[str], completions: list[str], *, scores: list[float], **columns: Any
) -> list[float]:
    """A reward that reads a column."""
    seen.update(columns, completions=completions)
    return scores


def passes_on(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """What a user would write who has the rewards already."""
    return columns.get("rewards", [0.0] * len(completions))


def without_columns(prompts: list[str], completions: list[str]) -> list[float]:
    """Takes no column."""
    return [2.0] * len(completions)


def nothing(prompts: list[str], completions: list[str], **columns: Any) -> list[None]:
    """No reward at all."""
    return [None] * len(completions)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny random language model."""
    folder = tmp_path_factory.mktemp("own")
    write_generated(folder / "data", num_examples=20, num_comparisons=2, seed=0, vocab_size=300)
    tokenizer = load_tokenizer(folder / "data" / "tokenizer")
    tiny_model(folder / "base", tokenizer, len(tokenizer))
    return folder / "base"


def k_way(**of_all: Any) -> list[dict[str, Any]]:
    """Rows with two completions; `of_all` has one value for each row."""
    return [
        {"prompt": prompt, "completions": ["a thing", f"a longer thing, {i}"]}
        | {name: values[i] for name, values in of_all.items()}
        for i, prompt in enumerate(PROMPTS)
    ]


def pairs(names: str | None = None) -> list[dict[str, Any]]:
    """The same as pairs, with scores under such names."""
    rows = []
    for row, own in zip(k_way(), OWN, strict=True):
        sides = dict(zip(("chosen", "rejected"), row["completions"], strict=True))
        scores = {names.format(side): own[i] for i, side in enumerate(sides)} if names else {}
        rows.append({"prompt": row["prompt"], "margin": 99.0} | sides | scores)
    return rows


def run(model: Path, folder: Path, rows: list[dict[str, Any]], *more: str) -> list[dict[str, Any]]:
    """Scores the rows; returns those of the scored folder."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"reference.path={model}", "reference.dtype=float32", f"data.path={path}"]
    score.main(load_config(ScoreConfig, [*arguments, f"output_dir={folder / 'scored'}", *more]))
    return pq.read_table(folder / "scored" / "part-00000.parquet").to_pylist()


def refusal(model: Path, folder: Path, rows: list[dict[str, Any]], *more: str) -> str:
    """The text by which they are refused."""
    with pytest.raises(InputError) as caught:
        run(model, folder, rows, *more)
    return str(caught.value)


@pytest.mark.parametrize(
    "rows",
    [
        k_way(rewards=OWN),
        *(pairs(names) for names in SCORE_NAMES),
        [row | {"rewards": own} for row, own in zip(pairs(), OWN, strict=True)],
    ],
    ids=["rewards", *SCORE_NAMES, "pairs with rewards"],
)
def test_without_a_function_the_rewards_of_the_rows_are_kept_and_train(
    rows, model, tmp_path, capfd
):
    got = run(model, tmp_path, 2 * rows)  # a batch of eight
    said = capfd.readouterr().err
    assert "no reward function is named: the rewards that the rows bring along are kept" in said
    for row, own in zip(got, 2 * OWN, strict=True):
        assert row["reward"] == pytest.approx(own)
        assert dict(row["rewards"])["given"] == pytest.approx(own)
        assert all(logp < 0 for logp in row["ref_logp"])
    side_car = scored.read_side_car(epath.Path(tmp_path / "scored"))
    assert side_car.complete and [spec["function"] for spec in side_car.rewards] == [GIVEN]
    arguments = [f"model.path={model}", "model.dtype=float32", f"data.path={tmp_path / 'scored'}"]
    arguments += ["training.batch_size=8", "training.max_steps=2", f"output_dir={tmp_path / 'p'}"]
    train_policy.main(load_config(PolicyConfig, arguments))
    lines = (tmp_path / "p" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [row["optim/grad_norm"] > 0 for row in metrics if "optim/grad_norm" in row] == [True] * 2
    assert metrics[0]["copg/residual"] > 0


@pytest.mark.parametrize("rows", [k_way(rewards=OWN), pairs("score_{}")], ids=["rewards", "pairs"])
@pytest.mark.parametrize("weight", [0.01, 2.0])
def test_given_and_computed_rewards_are_added_by_weight(rows, weight, model, tmp_path):
    length = f"{{function: copg_jax.rewards.length, weight: {weight}}}"
    got = run(model, tmp_path, rows, f"rewards=[{{function: {GIVEN}}}, {length}]")
    for row, own in zip(got, OWN, strict=True):
        by_name = dict(row["rewards"])
        assert by_name["given"] == pytest.approx(own)
        assert by_name["length"] == [-2.0, -4.0]
        assert row["reward"] == pytest.approx([own[0] - weight * 2, own[1] - weight * 4])


@pytest.mark.parametrize("function", ["passes_on", "without_columns"])
def test_a_function_of_ones_own_gets_the_rewards_of_the_rows_if_it_takes_them(
    function, model, tmp_path
):
    got = run(model, tmp_path, k_way(rewards=OWN), f"rewards=[{{function: {__name__}.{function}}}]")
    wanted = OWN if function == "passes_on" else [(2.0, 2.0)] * 4
    assert [row["reward"] for row in got] == [pytest.approx(own) for own in wanted]


@pytest.mark.parametrize("names", [None, "score_{}"])
def test_a_column_with_one_entry_a_completion_reaches_functions_so(names, model, tmp_path, capfd):
    if names:
        rows = [row | {"scores": own} for row, own in zip(pairs(names), OWN, strict=True)]
    else:
        rows = k_way(scores=OWN, tags=[["x"], ["x", "y"], [], ["z"]])
    got = run(model, tmp_path, rows, f"rewards=[{{function: {__name__}.by_column}}]")
    assert [row["reward"] for row in got] == [pytest.approx(own) for own in OWN]
    assert "columns with one entry for each completion: scores" in capfd.readouterr().err
    assert [json.loads(row["columns"])["scores"] for row in got] == [list(own) for own in OWN]
    if not names:  # the length of two in one row is chance
        assert seen["tags"] == [tags for row in rows for tags in [row["tags"]] * 2]


def test_a_list_of_one_entry_is_that_of_the_one_completion(model, tmp_path):
    rows = [{"prompt": f"Say {i}.", "completion": "a", "scores": [0.5 * i]} for i in range(4)]
    got = run(model, tmp_path, rows, f"rewards=[{{function: {__name__}.by_column}}]")
    assert [row["reward"] for row in got] == [[0.0], [0.5], [1.0], [1.5]]


def test_the_entry_of_a_completion_that_is_left_out_goes_with_it(model, tmp_path):
    rows = k_way(rewards=[(1.0, None, 2.0)] * 4, scores=[[i, 50, i + 1] for i in range(4)])
    for row in rows:
        row["completions"].append("a third thing")
    rows[3]["completions"][0] = "long " * 99
    rows[3]["rewards"] = [1.0, 3.0, 2.0]
    more = f"rewards=[{{function: {__name__}.by_column}}]", "data.max_completion_tokens=64"
    got = run(model, tmp_path, rows, *more)
    assert [row["reward"] for row in got] == [[0, 1], [1, 2], [2, 3], [50, 4]]


def test_a_column_that_stops_having_one_entry_a_completion_goes_whole_and_is_said(
    model, tmp_path, capfd
):
    tags = [["a", "b"], ["c", "d"], ["e"], ["f", "g"]]
    rows = k_way(tags=tags, labels=[[1, 2, 3], [1, 2], [1, 2], [1, 2]], scores=OWN)
    run(model, tmp_path, rows, f"rewards=[{{function: {__name__}.by_column}}]")
    assert seen["tags"] == [tag for tag in tags for _ in range(2)]
    assert seen["labels"][:4] == [[1, 2, 3], [1, 2, 3], [1, 2], [1, 2]]
    said = [line for line in capfd.readouterr().err.splitlines() if "WARNING" in line]
    names_all(said[0], ["'labels'", "rows.jsonl:1", "whole"])
    names_all(said[1], ["'tags'", "rows.jsonl:3", "whole"])


def test_a_row_with_null_for_a_column_of_one_entry_a_completion_has_null_for_each(model, tmp_path):
    rows = k_way(scores=[OWN[0], None, OWN[2], OWN[3]], late=[None, [1, 2], None, [3, 4]])
    got = run(model, tmp_path, rows, f"rewards=[{{function: {__name__}.by_column}}]")
    assert seen["late"] == [None, None, 1, 2, None, None, 3, 4]
    wanted = [[None, None] if own is None else list(own) for own in (OWN[0], None, OWN[2], OWN[3])]
    for row, scores in zip(got, wanted, strict=True):
        assert row["reward"] == (scores if scores[0] is None else pytest.approx(scores))
    assert [json.loads(row["columns"])["late"] for row in got] == [None, [1, 2], None, [3, 4]]


@pytest.mark.parametrize(
    "rows",
    [k_way(), k_way(rewards=[OWN[0], OWN[1], None, OWN[3]]), k_way(scores=OWN)],
    ids=["none", "one row without", "under another name"],
)
def test_rows_without_rewards_and_no_function_are_refused_with_the_fix(rows, model, tmp_path):
    text = refusal(model, tmp_path, rows)
    place = "rows.jsonl:3" if "rewards" in rows[0] else "rows.jsonl:1"
    names_all(text, ["rewards", "got none", place, "copg_jax.rewards.rouge_l", "`rewards`"])
    text = refusal(model, tmp_path / ".", rows, f"rewards=[{{function: {GIVEN}}}]")
    names_all(text, [GIVEN, place, "brings along"])
    assert not list(tmp_path.glob("scored/part-*"))


COMPARISONS = [
    {
        "info": {"id": str(i), "post": f"post {i}", "title": "t", "subreddit": "s"},
        "summaries": [{"text": f"one {i}"}, {"text": f"two {i}"}],
        "choice": 1,
    }
    for i in range(4)
]


@pytest.mark.parametrize(
    ("rows", "labels"), [(pairs(), [1, 0]), (COMPARISONS, [0, 1])], ids=["pairs", "comparisons"]
)
def test_choices_without_scores_are_rewards_only_where_that_is_asked_for(
    rows, labels, model, tmp_path
):
    text = refusal(model, tmp_path, rows)
    names_all(text, ["rows.jsonl:1", "choice", "got none", "copg_jax.rewards.rouge_l", GIVEN])
    (tmp_path / "asked").mkdir()
    got = run(model, tmp_path / "asked", rows, f"rewards=[{{function: {GIVEN}}}]")
    assert [row["reward"] for row in got] == [labels] * 4


@pytest.mark.parametrize("rows", [k_way(rewards=OWN), pairs("{}_reward")], ids=["rewards", "pairs"])
def test_all_none_is_an_error_and_no_folder_to_train_on(rows, model, tmp_path):
    text = refusal(model, tmp_path, rows, f"rewards=[{{function: {__name__}.nothing}}]")
    names_all(text, ["None of nothing", "not one of 8 completions"])
    assert not scored.read_side_car(epath.Path(tmp_path / "scored")).complete


@pytest.mark.parametrize("function", [GIVEN, f"{__name__}.needs_them"])
def test_an_evaluation_cannot_take_rewards_that_completions_bring_along(
    function, model, tmp_path, monkeypatch
):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in k_way(rewards=OWN)))
    arguments = [f"model.path={model}", f"output_dir={tmp_path / 'e'}", "model.dtype=float32"]
    arguments += [f"evaluation.data.path={path}", "evaluation.generation.num_prompts=4"]
    arguments += [f"evaluation.rewards=[{{function: {function}}}]"]
    with pytest.raises(InputError) as caught:
        evaluate.main(load_config(EvaluateConfig, arguments))
    names_all(str(caught.value), [function, "a model generates", "name another function"])


def needs_them(
    prompts: list[str], completions: list[str], rewards: list[float], **columns: Any
) -> list[float]:
    """Cannot do without the rewards of the rows."""
    return rewards

"""Claims about the data of the tasks beside TL;DR: in the formats that they are for, the same for a
seed, with room to improve; and their rewards know right from wrong."""

import contextlib
import random
import re

import pytest

from copg_jax.config.load import load_config
from copg_jax.config.sections import DataConfig
from copg_jax.config.stages import ScoreConfig
from copg_jax.data.dataset import prepare
from copg_jax.data.reader import GroupReader
from copg_jax.data.tokenizer import load_tokenizer
from copg_jax.rewards.functions import load_reward
from experiments.generated import TASKS, arithmetic, code, dialogue, write_generated
from experiments.generated.arithmetic import ARITHMETIC, Problem
from experiments.generated.code import CODE, Specification, Step
from experiments.generated.dialogue import DIALOGUE, OFFER, RUDE, Talk, reply_utility
from experiments.quickstart import QuickstartConfig, Stages
from tests.pages import ROOT

OTHERS = ("dialogue", "code", "arithmetic")
SIZES = {"num_examples": 60, "num_comparisons": 40, "vocab_size": 500}


@pytest.fixture(scope="module", params=OTHERS)
def written(request, tmp_path_factory):
    """A task and a folder with its data."""
    folder = tmp_path_factory.mktemp(request.param)
    write_generated(folder, task=request.param, seed=3, **SIZES)
    return request.param, folder


def rewards_of(task: str, completions: list[str], **columns) -> list[float]:
    """Rewards by the function that the config of the task names."""
    files = ["tldr", "sizes/quickstart", f"tasks/{task}"]
    score = load_config(ScoreConfig, [str(ROOT / "configs" / f"{name}.yaml") for name in files])
    (spec,) = score.rewards
    own = {name: [value] * len(completions) for name, value in columns.items()}
    prompts = ["a prompt"] * len(completions)
    return list(load_reward(spec)(prompts=prompts, completions=completions, **own))


# The files


def test_the_same_seed_writes_the_same_rows(written, tmp_path):
    task, folder = written
    for seed, same in ((3, True), (4, False)):
        write_generated(tmp_path, task=task, seed=seed, **SIZES)
        for name in ("sft.jsonl", "comparisons.jsonl"):
            assert ((tmp_path / name).read_bytes() == (folder / name).read_bytes()) == same


def test_rows_are_read_in_the_format_of_the_task_and_come_back_as_they_were_given(
    written, tmp_path
):
    task, folder = written
    tokenizer = load_tokenizer(folder / "tokenizer")
    completions = {"dialogue": 2, "code": 2, "arithmetic": 4}[task]
    for name, rows, count in (("sft", 60, 1), ("comparisons", 40, completions)):
        config = DataConfig(path=str(folder / f"{name}.jsonl"))
        reader = GroupReader(config)
        dataset = prepare(
            reader,
            tokenizer,
            path=tmp_path / f"{name}.arrow",
            limits=config.limits,
            vocab_size=len(tokenizer),
        )
        stats = dataset.stats
        assert stats["text_format"] == ("chat" if task == "dialogue" else "text")
        assert (stats["kept"], stats["completions"]["max"]) == (rows, count)
        assert not stats["changed"] and not stats["dropped"]
        assert stats["prompt_tokens"]["max"] <= 64 and stats["completion_tokens"]["max"] <= 32
        for text, group in zip(GroupReader(config), dataset, strict=True):
            assert (group.prompt, group.completions) == (text.prompt, text.completions)


def test_two_rows_of_a_task_are_hardly_ever_of_the_same_prompt():
    for task in OTHERS:
        prompts = [str(row["prompt"]) for row in TASKS[task].examples(1000, random.Random(0))]
        assert len(set(prompts)) > 900, task


# Word problems


def test_the_answer_of_a_word_problem_follows_from_its_words():
    for row in ARITHMETIC.examples(200, random.Random(0)):
        start, *changes = re.findall(r"(loses |sells |gives )?(\d+)", row["prompt"])
        answer = int(start[1]) + sum(-int(n) if away else int(n) for away, n in changes)
        assert row["answer"] == str(answer)


def test_a_word_problem_rewards_the_right_answer_in_the_last_line():
    problem = Problem(5, (3, -2), "Tom has 5 pens. ...")
    right = arithmetic.solution(problem.start, problem.changes)
    assert right == "5 + 3 = 8\n8 - 2 = 6\n#### 6"
    wrong = [
        arithmetic.solution(5, (3, -2), slip=(0, 1)),  # 5 + 3 = 9
        arithmetic.solution(5, (3, 2)),
        arithmetic.solution(5, (3,)),
        "#### 7",
        "#### -6",
        "5 + 3 = 8\n8 - 2 = 6",
    ]
    assert rewards_of("arithmetic", [right, "#### 6", *wrong], answer="6") == [1, 1] + [0] * 6


def test_two_of_five_word_problems_are_solved_and_most_groups_have_a_right_and_a_wrong_solution():
    solved = [
        row["completion"].endswith(f"#### {row['answer']}")
        for row in ARITHMETIC.examples(1000, random.Random(0))
    ]
    assert 0.4 < sum(solved) / 1000 < 0.5
    mixed = [
        len({text.endswith(f"#### {row['answer']}") for text in row["completions"]}) == 2
        for row in ARITHMETIC.comparisons(300, random.Random(0))
    ]
    assert sum(mixed) / 300 > 0.7


# Small functions

STEPS = (Step("adds {}", "+", 3), Step("multiplies by {}", "*", 2))
DOUBLED = Specification("solve", STEPS)


def test_a_specification_says_what_its_tests_ask():
    assert DOUBLED.prompt == "Write a function solve(x) that adds 3, then multiplies by 2.\n"
    assert DOUBLED.tests == [f"assert solve({x}) == {(x + 3) * 2}" for x in (0, 1, 5, 12)]


def test_a_right_program_passes_its_tests_and_one_with_a_bug_does_not():
    lines = [*(step.line for step in STEPS), "return x"]
    right = code.program("solve", lines)
    assert right == "def solve(x):\n    x = x + 3\n    x = x * 2\n    return x"
    wrong = [
        code.program("solve", ["x = x - 3", "x = x * 2", "return x"]),
        code.program("solve", ["x = x * 2", "x = x + 3", "return x"]),
        code.program("solve", ["x = x + 3", "x = x * 2"]),
        code.program("solve", lines, indentation=""),
        code.program("step", lines),
    ]
    partly = code.program("solve", ["x = x + 3", "x = x * 2", "return x % 10"])
    scores = rewards_of("code", [right, *wrong, partly], tests=DOUBLED.tests)
    assert scores == [1, 0, 0, 0, 0, 0, 0.5]


def test_two_of_five_programs_are_right():
    passed = []
    for row in CODE.examples(500, random.Random(0)):
        names: dict = {}
        with contextlib.suppress(SyntaxError, AssertionError, TypeError):
            exec(row["completion"], names)  # made by this project's own generator
            for test in row["tests"]:
                exec(test, names)
            passed.append(row)
    assert 0.4 < len(passed) / 500 < 0.5


# Dialogues

TALK = Talk("Anna", "bike", "market", 30, "shop", [])


@pytest.mark.parametrize(
    ("reply", "utility"),
    [
        (f"The bike was at the market, Anna. {OFFER}", 5),
        ("The bike was at the market, Anna.", 4),
        ("The bike was at the market.", 3),
        (f"The bike was at the museum, Anna. {OFFER}", 0),
        (f"I do not know, Anna. {OFFER}", 2),
        (f"{RUDE[0]} The bike was at the museum.", -4),
    ],
)
def test_each_flaw_of_a_reply_lowers_its_utility(reply, utility):
    assert reply_utility(TALK, reply) == utility


def test_of_two_replies_the_better_one_is_chosen_as_often_as_bradley_terry_says():
    rng = random.Random(0)
    better = []
    for row in DIALOGUE.comparisons(500, rng):
        words = row["prompt"][0]["content"]
        shop, price = re.findall(r"at the (\w+) and it was (\d+)", words)[0]
        name, asked = re.findall(r"I am (\w+)", words)[0], row["prompt"][2]["content"]
        talk = Talk(name, "", shop, int(price), "shop" if "Where" in asked else "price", [])
        chosen, rejected = (
            reply_utility(talk, row[k][0]["content"]) for k in ("chosen", "rejected")
        )
        if chosen != rejected:
            better.append(chosen > rejected)
    assert 0.8 < sum(better) / len(better) < 0.95


def test_a_third_of_the_replies_is_as_good_as_can_be():
    rng = random.Random(0)
    talks = [dialogue.make_talk(rng) for _ in range(1000)]
    best = [reply_utility(talk, dialogue.make_reply(rng, talk)) == 5 for talk in talks]
    assert 0.3 < sum(best) / 1000 < 0.4


# Their runs


@pytest.mark.parametrize(("task", "learnt"), [("tldr", True), ("dialogue", True), ("code", False)])
def test_a_reward_model_is_trained_where_a_reward_of_the_task_is_one(task, learnt):
    spec = Stages(QuickstartConfig(task=task, output_dir="x")).reward_model()
    assert (spec is not None) == learnt
    if spec is not None:
        assert spec.arguments["path"] == "x/reward/model"

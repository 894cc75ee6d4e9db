"""Reward functions: names that lead nowhere, arguments, answers, and what they raise."""

import sys
from pathlib import Path
from unittest import mock

from tests.bad_inputs.ground import Act, Case, Ground, rows, runs, settings, write

OWN = "tests.bad_inputs.functions"


def scoring(
    name: str, function: str, *words: str, arguments: str = "{}", weight: str = "1"
) -> Case:
    """Data is scored with a function."""
    spec = f"{{function: {function}, arguments: {arguments}, weight: {weight}}}"
    return Case(name, runs("score", f"rewards=[{spec}]"), words)


def answering(name: str, function: str, *words: str) -> Case:
    """A function answers something else, or raises; the rows are named."""
    return scoring(name, f"{OWN}.{function}", function, "comparisons.jsonl:1", *words)


def factory(name: str, function: str, *words: str) -> Case:
    """What makes the function is at fault."""
    return scoring(name, f"{OWN}.{function}", function, *words, arguments="{a: 1}")


def judged(arguments: str, word: str) -> Case:
    """The reward model with arguments that it cannot have."""
    given = f"{{path: HERE/m, {arguments}}}"
    act = scoring("", "copg_jax.rewards.RewardModel", arguments=given).act
    return Case(f"a reward model with {arguments}", linked(act), ("RewardModel", word))


def module(name: str, text: str, *words: str) -> Case:
    """A module of the user's own, which cannot be imported."""

    def act(ground: Ground, here: Path) -> object:
        write(here / "theirs.py", text)
        sys.modules.pop("theirs", None)
        with mock.patch("sys.path", [str(here), *sys.path]):
            return runs("score", "rewards=[{function: theirs.reward}]")(ground, here)

    return Case(name, act, ("theirs.reward", *words))


def with_column(column: str, *words: str, function: str = "copg_jax.rewards.length") -> Case:
    """Rows with a column of a name that functions know for something else."""
    row = {"prompt": "Say a.", "chosen": "a", "rejected": "b", column: "x"}
    act = rows("score", *[row] * 9, more=[f"rewards=[{{function: {function}}}]"])
    return Case(f"a column named {column}", act, (column, *words))


def linked(act: Act) -> Act:
    """The same beside the reward model, HERE/m."""

    def linking(ground: Ground, here: Path) -> object:
        (here / "m").symlink_to(ground.reward_model)
        return act(ground, here)

    return linking


PATHS = ["length", "copg_jax.rewards.", ".length", "copg_jax..length", "copg_jax.rewards.no_such",
         "copg_jax.no_such.length", "copg_jax.rewards:length", "my/rewards.py", "a b.c",
         f"{OWN}.NOT_CALLABLE", "json", "copg_jax.rewards.RewardModel"]  # fmt: skip
NAMES = [
    *(scoring(f"the function {path!r}", path, path) for path in PATHS),
    scoring("a function without a name", "''", "reward function"),
    *(
        scoring(f"the built-in {path}", path, path)
        for path in ("os.getcwd", "builtins.eval", "builtins.print", "time.time", "builtins.dict")
    ),
    scoring("a function of one text", f"{OWN}.of_one_text", "of_one_text"),
    scoring("a function that takes no columns", f"{OWN}.without_columns", "without_columns"),
    scoring("a column that the data lacks", "copg_jax.rewards.rouge_l", "rouge_l", "reference"),
    scoring(
        "arguments for what takes none", "copg_jax.rewards.length", "length", arguments="{a: 1}"
    ),
    scoring("a weight below float32", "copg_jax.rewards.length", "weight", weight="1e-46"),
]
FACTORIES = [
    factory("a factory of a number", "five"),
    factory("a factory of nothing", "nothing"),
    factory("a factory of something else", "nested"),
    factory("a factory that fails", "fails", "no such judge", "functions.py"),
    factory("a factory that ends the process", "ends"),
    factory("a factory that is no function", "NOT_CALLABLE"),
    *(
        judged(arguments, word)
        for arguments, word in [
            ("batch_size: 0", "batch_size"),
            ("batch_size: -3", "batch_size"),
            ("batch_size: many", "batch_size"),
            ("batch_size: 1.5", "batch_size"),
            ("dtype: int8", "dtype"),
            ("dtype: null", "dtype"),
            ("max_prompt_tokens: 0", "max_prompt_tokens"),
            ("max_prompt_tokens: -1", "max_prompt_tokens"),
            ("max_prompt_tokens: x", "max_prompt_tokens"),
            ("btach_size: 3", "btach_size"),
        ]
    ),
    scoring("a reward model without a path", "copg_jax.rewards.RewardModel", "path",
            arguments="{batch_size: 3}"),
    scoring("a reward model that is nowhere", "copg_jax.rewards.RewardModel", "no/such/model",
            arguments="{path: no/such/model}"),
    scoring("a reward model whose path is a list", "copg_jax.rewards.RewardModel", "RewardModel",
            arguments="{path: [5]}"),
]  # fmt: skip
PROGRAMS = "copg_jax.rewards.unit_tests"
WORKERS = [
    scoring("unit tests without arguments", PROGRAMS, PROGRAMS, "A factory needs `arguments`"),
    scoring("unit tests of a column that there is not", PROGRAMS, PROGRAMS, "'checks'",
            arguments="{column: checks}"),
    scoring("a limit that there is not", PROGRAMS, PROGRAMS, "cpu_seconds",
            arguments="{column: checks, cpu_seconds: 3}"),
    Case("unit tests that are no Python",
         rows("score", {"prompt": "Say a.", "completions": ["a", "b"], "checks": "assert ("},
              more=[f"rewards=[{{function: {PROGRAMS}, arguments: {{column: checks}}}}]"]),
         (PROGRAMS, "rows.jsonl:1", "'checks'", "is no Python")),
    scoring("a pattern that is none", "copg_jax.rewards.regex", "regex", "pattern",
            arguments="{pattern: '('}"),
    Case("a time-out without workers",
         settings("score", "rewards=[{function: copg_jax.rewards.length, timeout_sec: 5}]"),
         ("rewards[0]", "timeout_sec", "num_workers")),
    Case("workers for a reward model",
         runs("score", "rewards=[{function: copg_jax.rewards.RewardModel, arguments: {path: m}, "
              "num_workers: 2}]"),
         ("RewardModel", "num_workers", "accelerator")),
    Case("a function that answers wrongly in a worker",
         runs("score", f"rewards=[{{function: {OWN}.exact, num_workers: 1}}]"),
         ("exact", "comparisons.jsonl:1", "Decimal")),
    Case("a function whose worker always ends",
         runs("score", f"rewards=[{{function: {OWN}.leaves, num_workers: 1}}]"),
         ("leaves", "the first 32 completions all failed", "SystemExit")),
]  # fmt: skip
ANSWERS = [
    answering("StopIteration in a function", "stops", "StopIteration"),
    answering("MemoryError in a function", "takes_all_memory", "MemoryError"),
    answering("a function without end", "goes_round", "RecursionError"),
    answering("an exception without a text", "says_nothing", "Unspeakable"),
    answering("an assertion in a function", "asserts", "AssertionError"),
    answering("a function that ends the process", "leaves", "SystemExit"),
    answering("a function that is cancelled", "is_cancelled", "CancelledError"),
    answering("numbers of another sort", "exact", "Decimal"),
    scoring("a function to be awaited", f"{OWN}.is_awaited", "is_awaited"),
    scoring("a reward times its weight beyond float32", f"{OWN}.huge", "comparisons.jsonl:1",
            weight="2"),
    Case("two rewards of one name",
         runs("score", f"rewards=[{{function: {OWN}.huge}}, {{function: {OWN}.huge}}]"),
         ("rewards", "'huge'", "name: huge_2")),
    *(
        Case(f"NaN from one reward of several, of weight {weight}",
             runs("score", "rewards=[{function: copg_jax.rewards.length}, "
                  f"{{function: {OWN}.nan, weight: {weight}}}]"),
             ("comparisons.jsonl:1", f"{OWN}.nan", "nan"))
        for weight in (1, 0)
    ),
    Case("rewards whose sum is beyond float32",
         runs("score", f"rewards=[{{function: {OWN}.huge}}, "
              f"{{function: {OWN}.huge, name: again}}]"),
         ("comparisons.jsonl:1",)),
    Case("no reward for any generation",
         runs("evaluate", f"evaluation.rewards=[{{function: {OWN}.none_at_all}}]"),
         ("reward",)),
]  # fmt: skip
MODULES = [
    module("a module with a name that is missing", "x = 1\nreward = not_defined\n", "theirs.py:2"),
    module("a module that imports itself away", "from theirs import reward\n", "theirs"),
    module("a module with a NUL", "reward = '\0'\n", "theirs"),
    module("a module in another encoding", "# coding: nowhere\nreward = 1\n", "theirs"),
    module("a module without the function", "def rewrad(): ...\n", "theirs"),
]
COLUMNS = [
    with_column("prompts", "length"),
    with_column("completions", "rows.jsonl:1"),
    with_column("self", "judge", function=f"{OWN}.judge"),
]

CASES = [*NAMES, *FACTORIES, *WORKERS, *ANSWERS, *MODULES, *COLUMNS]

"""What a reward function may answer, and how what goes wrong in one is named."""

import math
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from copg_jax.config.reward_spec import RewardSpec
from copg_jax.errors import InputError
from copg_jax.rewards import Missing, protocol
from copg_jax.rewards.functions import WeightedRewards, load_reward
from copg_jax.rewards.protocol import score_texts
from copg_jax.runtime import signals_as_exits
from tests.toys import names_all


def ask(answer: Any, completions: list[str]) -> np.ndarray:
    """What `score_texts` makes of an answer."""
    return score_texts(lambda **_: answer, ["p"] * len(completions), completions, {}, name="mine")


@pytest.mark.parametrize(
    "answer",
    [
        [1, None, 2.5],
        (True, None, 2.5),
        [1, Missing("no_answer"), 2.5],
        np.array([1, None, 2.5], object),
        [np.float32(1), None, jax.numpy.float32(2.5)],
        [np.True_, None, np.array(2.5)],
        np.ma.array([1, 7, 2.5], mask=[False, True, False]),
    ],
)
def test_an_answer_is_a_number_or_none_for_each_completion_and_none_drops_it(answer):
    np.testing.assert_array_equal(ask(answer, ["a", "b", "c"]), [1, np.nan, 2.5])


@pytest.mark.parametrize("module", [np, jax.numpy])
def test_an_array_of_one_axis_is_an_answer_too(module):
    np.testing.assert_array_equal(ask(module.array([1.0, -2.5]), ["a", "b"]), [1, -2.5])


class Tensor:
    """One of an accelerator, which NumPy cannot read."""

    ndim = 1

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("can't convert it to numpy. Use Tensor.cpu() first")

    def __iter__(self):
        return iter([np.float32(1), np.float32(-2.5)])


def test_a_tensor_that_numpy_cannot_read_is_an_answer_too():
    np.testing.assert_array_equal(ask(Tensor(), ["a", "b"]), [1, -2.5])


class Unwritable:
    """Fails where it is shown, compared or asked for its number."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    def item(self) -> float:
        raise RuntimeError("no number")


@pytest.mark.parametrize("value", [np.array([1, 2]), Unwritable()])
def test_a_change_to_what_cannot_be_compared_is_a_change(value):
    def changes(prompts: list[str], completions: list[str], x: list[Any]) -> list[float]:
        x[0] = value
        return [0.0]

    answer = protocol.ask(changes, ["p"], ["c"], {"x": [[1, 2]]}, name="changes")
    assert answer.remarks["changes"].startswith("changes what it is given (x)")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([1.0], ["wanted 2 rewards, one a completion", "got 1"]),
        (np.ones(3), ["wanted 2 rewards, one a completion", "got 3"]),
        *(
            ([1.0, value], ["prompt 'p'", "finite number", "None", shown, "completion 'second'"])
            for value, shown in [
                (-math.inf, "-inf"),
                (math.nan, "nan"),
                (1e39, "1e+39"),
                (-(10**400), "-1000"),
                ("1.5", "'1.5'"),
                ([2.0], "[2.0]"),
                (1j, "1j"),
                (np.str_("1.5"), "1.5"),
                (Decimal("1.5"), "Decimal"),
                (10**5000, "cannot be written (int)"),
                (Unwritable(), "cannot be written (Unwritable)"),
            ]
        ),
        *(
            (answer, ["wanted a list of 2 numbers or None", f"({kind})"])
            for answer, kind in [
                ({1.0: 0, 2.0: 0}, "dict"),
                ({1.0, 2.0}, "set"),
                ("12", "str"),
                (b"12", "bytes"),
                ((x for x in (1.0, 2.0)), "generator"),
                (1.0, "float"),
                (np.ones((2, 1)), "ndarray"),
                (np.float32(1), "float32"),
            ]
        ),
        (None, ["NoneType", "a `return` missing?"]),
        ([1.0, Missing("no answer")], ["Missing", "a reason of letters", "'no answer'"]),
        ([1.0, Missing(404)], ["Missing", "a reason of letters", "404 (int)"]),  # pyright: ignore[reportArgumentType]
    ],
)
def test_an_answer_that_is_no_list_of_rewards_is_refused(answer, words):
    with pytest.raises(InputError) as caught:
        ask(answer, ["first", "second"])
    names_all(str(caught.value), ["mine", *words])


MODULE = """import sys

def fails(prompts, completions, **columns):
    return [helper(text) for text in completions]

def helper(text):
    return {"a": 1.0, "b": 2.0}[text]

def leaves(prompts, completions, **columns):
    if "c" in completions:
        sys.exit(0)
    return [0.0] * len(completions)

def reads_json(prompts, completions, **columns):
    import json
    return [json.loads("{" if text == "c" else "1") for text in completions]

def moody(prompts, completions, **columns):
    if len(completions) == 4:
        raise OSError("four are too many")

class Odd(BaseException):
    def __str__(self):
        raise RuntimeError("no text")

def odd(prompts, completions, **columns):
    raise Odd

def stops(prompts, completions, **columns):
    return [next(iter(text.split("c")[1:1])) for text in completions]

def factory(path):
    return open(path)

def leaving_factory(path):
    sys.exit(path)
"""


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Writes a module of the user's own; returns its file."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> Path:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(text)
        return tmp_path / f"{name}.py"

    return write


@pytest.mark.parametrize(
    ("name", "words", "line"),
    [
        ("fails", ["f:1 to f:4: ", "KeyError: 'c'"], 7),
        ("leaves", ["f:1 to f:4: ", "SystemExit: 0"], 11),
        ("reads_json", ["f:1 to f:4: ", "JSONDecodeError"], 16),
        ("moody", ["f:1 to f:4: ", "OSError: four are too many"], 20),
        ("odd", ["f:1 to f:4: ", "Odd: (its text fails"], 27),
        ("stops", ["f:1 to f:4: ", "StopIteration, at"], 30),
    ],
)
def test_what_a_function_raises_is_named_with_the_rows_and_the_user_s_own_line(
    name, words, line, write_module
):
    file = write_module("reward_that_fails", MODULE)
    function = load_reward(RewardSpec(f"reward_that_fails.{name}"))
    places = ["f:1", "f:2", "f:3", "f:4"]
    with pytest.raises(InputError) as caught:
        score_texts(function, ["p"] * 4, ["a", "b", "c", "a"], {}, name=name, where=places)
    text = str(caught.value)
    names_all(text, [*words, f"reward function {name}", f"{file}:{line}"])
    assert "copg_jax" not in text


def test_a_function_that_failed_is_not_called_again():
    seen = []

    def paid(prompts: list[str], completions: list[str]) -> list[float]:
        seen.extend(completions)
        return [{"a": 1.0}[text] for text in completions]

    with pytest.raises(InputError):
        score_texts(paid, ["p"] * 4, ["a", "a", "a", "b"], {}, name="paid")
    assert seen == ["a", "a", "a", "b"]


SIGNALLED = """import os, signal
def send(*_, **__):
    os.kill(os.getpid(), signal.{0})
    return [1.0]
"""


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize(
    "use",
    [
        lambda send: score_texts(send, ["p"] * 2, ["a", "b"], {}, name="send"),
        lambda _: load_reward(RewardSpec("signalled.send", {"a": 1})),
        lambda _: load_reward(RewardSpec("signalled_on_import.send")),
    ],
    ids=["function", "factory", "import"],
)
def test_a_signal_inside_a_function_ends_the_run_with_its_own_status(
    use, name, status, write_module
):
    write_module("signalled", SIGNALLED.format(name))
    write_module("signalled_on_import", SIGNALLED.format(name) + "send()\n")
    send = load_reward(RewardSpec("signalled.send"))
    with pytest.raises(SystemExit) as caught, signals_as_exits():
        use(send)
    assert caught.value.code == status


@pytest.mark.parametrize(
    ("name", "words", "line"),
    [
        ("factory", ["FileNotFoundError", "no/such"], 33),
        ("leaving_factory", ["SystemExit: no/such"], 36),
    ],
)
def test_what_a_factory_raises_is_named_with_the_user_s_own_line(name, words, line, write_module):
    file = write_module("factory_that_fails", MODULE)
    with pytest.raises(InputError) as caught:
        load_reward(RewardSpec(f"factory_that_fails.{name}", {"path": "no/such"}))
    names_all(str(caught.value), [f"factory_that_fails.{name}", *words, f"{file}:{line}"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import sys\nsys.exit(0)\n", ["SystemExit: 0", ":2"]),
        ("\n\n1 / 0\n", ["ZeroDivisionError", ":3"]),
        ("import no_such_module\n", ["no_such_module", ":1"]),
        ("def (:\n", ["SyntaxError", "line 1"]),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_with_the_user_s_own_line(
    text, words, write_module
):
    file = write_module("does_not_import", text)
    with pytest.raises(InputError) as caught:
        load_reward(RewardSpec("does_not_import.reward"))
    names_all(str(caught.value), ["'does_not_import.reward'", file.name, *words])


def makes_a_number(size: int) -> int:
    """A factory that makes no function."""
    return size


def makes_nothing(size: int) -> None:
    """A factory whose return was forgotten."""


async def is_async(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Nobody would wait for it."""
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("name", "arguments", "shown"),
    [
        ("makes_a_number", {"size": 5}, "got 5 (int) from its factory"),
        ("makes_nothing", {"size": 5}, "got None (NoneType) from its factory"),
        ("is_async", {}, "none that is async, got <function is_async"),
    ],
)
def test_what_is_no_function_that_can_be_called_is_refused_when_it_is_opened(
    name, arguments, shown
):
    with pytest.raises(InputError) as caught:
        WeightedRewards([RewardSpec(f"{__name__}.{name}", arguments)])
    names_all(str(caught.value), [f"{__name__}.{name}", "wanted a function", shown])


@pytest.mark.parametrize("value", [0, -3, 2.5, "many", True])
@pytest.mark.parametrize("name", ["batch_size", "max_prompt_tokens"])
def test_sizes_of_a_reward_model_are_checked_before_it_is_read(name, value):
    arguments = {name: value}
    spec = RewardSpec("copg_jax.rewards.RewardModel", {"path": "no/such/folder"} | arguments)
    with pytest.raises(InputError) as caught:
        load_reward(spec)
    wanted = ["RewardModel", f"{name}: wanted a whole number of at least 1", repr(value)]
    names_all(str(caught.value), wanted)


def huge(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Finite, and twice that is not."""
    return [1.0, -3e38]


@pytest.mark.parametrize("weights", [[2.0], [1.0, 1.0], [-2e30]])
def test_a_weighted_sum_that_float32_cannot_hold_is_refused_with_the_row(weights):
    function = WeightedRewards(
        [RewardSpec(f"{__name__}.huge", {}, w, name=f"huge{i}") for i, w in enumerate(weights)]
    )
    with pytest.raises(InputError, match=r"f:2: the combined reward is -?6e\+"):
        function(["p", "p"], ["a", "b"], {}, ["f:1", "f:2"], num_tokens=[1, 1])


def empties(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Changes all that it is given."""
    prompts.clear()
    completions.clear()
    columns["nested"][0]["a"].clear()
    columns["topic"].clear()
    return [0.0, 0.0]


def counts(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Looks at all that it is given."""
    size = len(prompts) + len(completions) + len(columns["topic"])
    return [float(size + len(row["a"])) for row in columns["nested"]]


@pytest.mark.parametrize("order", [["empties", "counts"], ["counts", "empties", "counts"]])
def test_what_a_reward_does_to_its_arguments_no_other_sees(order):
    columns = {"nested": [{"a": [1, 2]}, {"a": [3]}], "topic": ["x", "y"]}
    function = WeightedRewards(
        [RewardSpec(f"{__name__}.{name}", name=f"{name}{i}") for i, name in enumerate(order)]
    )
    total, _ = function(["p", "p"], ["a", "b"], columns, num_tokens=[1, 1])
    np.testing.assert_array_equal(total, np.array([8, 7]) * order.count("counts"))
    assert columns == {"nested": [{"a": [1, 2]}, {"a": [3]}], "topic": ["x", "y"]}


@pytest.mark.parametrize("path", ["math.fsum", "builtins.max"])
def test_a_builtin_is_refused_where_it_is_hashed(path):
    with pytest.raises(InputError, match=r"source cannot be read.*file of your own"):
        _ = WeightedRewards([RewardSpec(path)]).provenance

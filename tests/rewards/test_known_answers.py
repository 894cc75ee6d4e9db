"""Rewards of known answers: the same text, a pattern, the same mathematics."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from copg_jax.errors import InputError
from copg_jax.rewards import Missing, exact_match, math_answer, regex


def reward(function: Any, completion: Any, answer: Any) -> Any:
    """The reward of one completion."""
    (value,) = function(prompts=["p"], completions=[completion], answer=[answer], other=[1])
    return value


NUMBER = {"pattern": r"-?\d+"}
LABELLED = {"pattern": r"#### (.*)"}


@pytest.mark.parametrize(
    ("completion", "answer", "arguments", "wanted"),
    [
        (" 42\n", "42", {}, 1.0),
        ("42", 42, {}, 1.0),
        ("42.", "42", {}, 0.0),
        ("Yes", "yes", {}, 0.0),
        ("Yes", "yes", {"ignore_case": True}, 1.0),
        ("b", ["a", "b"], {}, 1.0),
        ("c", ["a", "b"], {}, 0.0),
        ([{"role": "assistant", "content": "42"}], "42", {}, 1.0),
        ("6 and 7 make 42!", "42", NUMBER, 1.0),
        ("42 it is, not 41", "42", NUMBER, 0.0),
        ("no number", "42", NUMBER, 0.0),
        ("#### 41\n#### 42 ", "42", LABELLED, 1.0),
        ("42", "42", LABELLED, 0.0),
        ("42", None, {}, Missing("no_answer")),
    ],
)
def test_exact_match_is_of_the_whole_text_or_of_what_the_pattern_finds_last(
    completion, answer, arguments, wanted
):
    assert reward(exact_match("answer", **arguments), completion, answer) == wanted


FORM = r"(?s)<think>.*</think>\s*<answer>.*</answer>"


@pytest.mark.parametrize(
    ("completion", "found", "whole"),
    [
        ("<think>a\nb</think>\n<answer>c</answer>", 1.0, 1.0),
        ("well: <think>a</think><answer>c</answer>", 1.0, 0.0),
        ("<answer>c</answer>", 0.0, 0.0),
    ],
)
def test_regex_finds_a_form_anywhere_or_is_the_whole(completion, found, whole):
    assert reward(regex(FORM), completion, None) == found
    assert reward(regex(FORM, whole=True), completion, None) == whole


@pytest.mark.parametrize("pattern", ["(", "*", 5])
@pytest.mark.parametrize("make", [regex, lambda pattern: exact_match("answer", pattern=pattern)])
def test_a_pattern_that_is_none_is_refused(make, pattern):
    with pytest.raises(InputError, match="pattern: wanted a regular expression, got"):
        make(pattern)


def test_without_math_verify_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"math-verify.*pip install 'copg_jax\[math\]'"):
        math_answer("answer")


def test_math_answer_asks_the_library_with_the_row_s_answer_first(monkeypatch):
    """The order counts: it takes what stands in the gold answer as it is."""
    asked = []

    def verify(gold: list[str], found: list[str]) -> bool:
        asked.append((gold, found))
        return gold == found

    parse = lambda text: text.split()
    monkeypatch.setitem(sys.modules, "math_verify", SimpleNamespace(parse=parse, verify=verify))
    assert reward(math_answer("answer"), "a", 5) == 0.0
    assert reward(math_answer("answer"), "5", 5) == 1.0
    assert reward(math_answer("answer"), "5", " ") == Missing("no_answer")
    assert asked == [(["5"], ["a"]), (["5"], ["5"])]


@pytest.mark.oracle("math_verify")
@pytest.mark.parametrize(
    ("completion", "answer", "wanted"),
    [
        (r"So it is $\frac{1}{2}$.", r"$\frac{1}{2}$", 1.0),
        ("The answer is 0.5", r"$\frac{1}{2}$", 1.0),
        (r"\boxed{2\sqrt{2}}", r"$\sqrt{8}$", 1.0),
        ("First 3, then 4", 4, 1.0),
        ("First 3, then 4", 3, 0.0),
        ("no idea", "7", 0.0),
        ("", "7", 0.0),
        ("7", "", Missing("no_answer")),
        ("7", None, Missing("no_answer")),
        ([{"role": "assistant", "content": "It is 7."}], "7", 1.0),
    ],
)
def test_math_answer_is_about_values_and_not_about_how_they_are_written(completion, answer, wanted):
    assert reward(math_answer("answer"), completion, answer) == wanted

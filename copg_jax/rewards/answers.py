"""Rewards of completions with a known answer: the same text, a pattern, the same mathematics."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from copg_jax.errors import InputError
from copg_jax.rewards.protocol import Missing, RewardFn, reading
from copg_jax.rewards.text import as_text


def exact_match(column: str, *, pattern: str | None = None, ignore_case: bool = False) -> RewardFn:
    """Makes the reward *1 if the completion is the row's answer, else 0*.

    As "exact match" of Rajpurkar et al. 2016 (SQuAD), but of the whole text: blanks at both ends
    do not count, everything else does. A row without an answer has no reward (`no_answer`).

    Args:
        column: of the answers: a text or a number, or a list of those that are right.
        pattern: regular expression; the last match in the completion is compared, or its first
            group where it has one. Without a match the completion is wrong.
        ignore_case: whether `Yes` is `yes`.

    Raises:
        InputError: a pattern that is none.
    """
    find = None if pattern is None else _compiled(pattern)

    def normal(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    def score(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | Missing]:
        rewards: list[float | Missing] = []
        for completion, value in zip(completions, columns[column], strict=True):
            right = {normal(str(one)) for one in (value if isinstance(value, list) else [value])}
            text = as_text(completion)
            text = text if find is None else _last(find, text)
            if value is None:
                rewards.append(Missing("no_answer"))
            else:
                rewards.append(float(text is not None and normal(text) in right))
        return rewards

    return reading(column, score)


def regex(pattern: str, *, whole: bool = False) -> RewardFn:
    """Makes the reward *1 if the pattern is found in the completion, else 0*.

    The "format reward" of DeepSeek-AI 2025 (DeepSeek-R1). A pattern may take for ever on some
    texts: give the reward a `timeout_sec`.

    Args:
        pattern: regular expression of Python's `re`; `(?s)` at its begin lets a dot be a newline.
        whole: whether it has to match the whole completion.

    Raises:
        InputError: a pattern that is none.
    """
    compiled = _compiled(pattern)
    match: Callable[[str], Any] = compiled.fullmatch if whole else compiled.search

    def score(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        return [float(match(as_text(completion)) is not None) for completion in completions]

    return score


def math_answer(column: str) -> RewardFn:
    """Makes the reward *1 if the completion's answer equals the row's as mathematics, else 0*.

    By the library math-verify (Hugging Face): the last number or LaTeX expression of a completion
    is its answer; ½, 0.5 and \\frac{1}{2} are equal. A row without an answer that can be read has
    no reward (`no_answer`).

    Args:
        column: of the answers: text with a number or LaTeX, such as `$\\frac{1}{2}$`, or a number.

    Raises:
        InputError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"wanted the library math-verify, which is not installed ({error}). Fix: install the "
            "extra `math`: pip install 'copg_jax[math]'"
        ) from error

    def score(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | Missing]:
        rewards: list[float | Missing] = []
        for completion, answer in zip(completions, columns[column], strict=True):
            right = [] if answer is None else parse(str(answer))
            if right:
                rewards.append(float(verify(right, parse(as_text(completion)))))
            else:
                rewards.append(Missing("no_answer"))
        return rewards

    return reading(column, score)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise InputError(
            f"pattern: wanted a regular expression, got {pattern!r:.80}: {error}"
        ) from error


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match, or its first group; None without a match."""
    found = None
    for found in pattern.finditer(text):  # noqa: B007
        pass
    return None if found is None else found[1 if pattern.groups else 0]

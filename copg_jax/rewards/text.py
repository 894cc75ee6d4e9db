"""Rewards that need no model: those that rows bring along, and those that read texts."""

from collections.abc import Sequence
from typing import Any

from copg_jax.data.formats.texts import Text, content


def given(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    *,
    rewards: Sequence[float | None],
    **columns: Any,
) -> Sequence[float | None]:
    """The reward that each completion's row has for it; of a human choice without scores, 1 and 0.

    Args:
        prompts: unused.
        completions: unused.
        rewards: the rows' own rewards, one a completion; [N].
        columns: unused.
    """
    return rewards


def length(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
    """Minus the number of words: the shorter, the better."""
    return [-float(len(content(text).split())) for text in completions]


def rouge_l(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    *,
    reference: Sequence[str | None],
    **columns: Any,
) -> list[float | None]:
    """ROUGE-L F1 (with stemming) against the author's summary; None where there is no reference.

    Args:
        prompts: unused.
        completions: [N].
        reference: the data set's column of reference summaries; [N].
        columns: unused.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        None if target is None else scorer.score(target, content(text))["rougeL"].fmeasure
        for target, text in zip(reference, completions, strict=True)
    ]

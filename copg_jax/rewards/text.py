"""Rewards that need no model: those that rows bring along, and those that read texts."""

from collections.abc import Mapping, Sequence
from typing import Any

from copg_jax.data.formats.texts import Text


def as_text(value: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt or completion as one text: of messages, their contents on lines of their own."""
    if isinstance(value, str):
        return value
    return "\n".join(str(message["content"]) for message in value)


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
    return [-float(len(as_text(completion).split())) for completion in completions]


def rouge_l(
    prompts: Sequence[str],
    completions: Sequence[Any],
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
        None if target is None else scorer.score(target, as_text(completion))["rougeL"].fmeasure
        for target, completion in zip(reference, completions, strict=True)
    ]

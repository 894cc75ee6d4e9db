"""Policies that were evaluated on the same prompts, beside each other.

1. Numbers of a policy are taken prompt by prompt from its generations, so that two policies are
   compared by paired differences: what makes a prompt easy or hard for both cancels.
2. Rewards are given above those of a baseline on the same prompts: a Bradley-Terry reward is
   defined up to a constant only.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from copg_jax.data.formats.texts import TextGroup, content
from copg_jax.data.groups import TokenGroup
from copg_jax.errors import InputError
from copg_jax.files import read_json_lines
from copg_jax.rewards.protocol import RewardFn, score_texts

AGAIN = "Fix: delete the folder, and the same command of the study or the stage makes it again."
# Of a generation.
_FIELDS = {
    "index",
    "completion",
    "reward",
    "logp",
    "ref_logp",
    "length",
    "has_eos",
}
TIE_STDERRS = 2.0
"""Differences of fewer standard errors than this are called ties."""


class Estimate(NamedTuple):
    """A mean over prompts with its standard error."""

    mean: float
    stderr: float

    def __str__(self) -> str:
        return f"{round(self.mean, 3) + 0.0:.3f} ± {self.stderr:.3f}"  # no "-0.000"

    @property
    def is_tie(self) -> bool:
        """Whether, as a difference, it is too small to be told from 0."""
        return abs(self.mean) < TIE_STDERRS * self.stderr


@dataclass(frozen=True)
class Policy:
    """What was measured on one policy, one number a prompt, [N] each, in the order of the prompts.

    Attributes:
        reward: reward units; NaN where no completion of the prompt has one.
        log_ratio: ln π − ln π_ref of what the policy wrote, nats; its mean estimates the KL.
        length: tokens.
        eos_rate: share of completions that ended.
        repetition: share of the three-word sequences of a text that it has had before.
        named: name → that reward alone; empty where there is one reward only.
    """

    reward: np.ndarray
    log_ratio: np.ndarray
    length: np.ndarray
    eos_rate: np.ndarray
    repetition: np.ndarray
    named: Mapping[str, np.ndarray] = field(default_factory=dict)

    def regularized(self, beta: float) -> np.ndarray:
        """R − β (ln π − ln π_ref), [N], whose mean is the objective E[R] − β·KL."""
        return self.reward - beta * self.log_ratio


def read_policy(folder: epath.Path | Path) -> Policy:
    """Reads the generations.jsonl of an evaluation; samples of one prompt are averaged."""
    path = folder / "generations.jsonl"
    if not path.exists():
        raise InputError(f"{path}: wanted the generations of an evaluation, got no file. {AGAIN}")
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for number, (_, row) in enumerate(read_json_lines(path), start=1):
        if not isinstance(row, dict) or not row.keys() >= _FIELDS:
            raise InputError(
                f"{path}:{number}: wanted a generation with {', '.join(sorted(_FIELDS))}, got "
                f"{str(row)[:80]}. {AGAIN}"
            )
        by_prompt.setdefault(row["index"], []).append(row)
    prompts = [by_prompt[index] for index in sorted(by_prompt)]
    names = list(prompts[0][0].get("rewards", {})) if prompts else []
    return Policy(
        reward=np.array([_mean(row["reward"] for row in rows) for rows in prompts]),
        log_ratio=np.array([_mean(r["logp"] - r["ref_logp"] for r in rows) for rows in prompts]),
        length=np.array([_mean(row["length"] for row in rows) for rows in prompts]),
        eos_rate=np.array([_mean(row["has_eos"] for row in rows) for rows in prompts]),
        repetition=np.array([_mean(map(_repetition, rows)) for rows in prompts]),
        named={
            name: np.array([_mean(row["rewards"][name] for row in rows) for rows in prompts])
            for name in (names if len(names) > 1 else ())
        },
    )


def _mean(values: Any) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def _repetition(row: Mapping[str, Any]) -> float:
    words = content(row["completion"]).split()
    threes = [*zip(words, words[1:], words[2:], strict=False)]
    return 1.0 - len(set(threes)) / len(threes) if threes else 0.0


def estimate(values: np.ndarray) -> Estimate:
    """Mean and standard error over prompts; those without a number are left out."""
    known = values[np.isfinite(values)]
    if len(known) < 2:
        return Estimate(float(known.mean()) if len(known) else math.nan, math.nan)
    return Estimate(float(known.mean()), float(known.std(ddof=1) / np.sqrt(len(known))))


def rank(value: float) -> float:
    """A number to find the best by: what is not finite is below all others."""
    return value if math.isfinite(value) else -math.inf


def measure(policy: Policy, baseline: Policy, *, beta: float) -> dict[str, Estimate]:
    """A policy against a baseline that had the same prompts: `reward` and `objective`, which are
    paired differences to the baseline's, and `kl` to the reference.

    Args:
        policy: [N].
        baseline: [N]; its rewards are the zero of the policy's.
        beta: β of the objective, the same for all that shall be compared.
    """
    return {
        "reward": estimate(policy.reward - baseline.reward),
        "kl": estimate(policy.log_ratio),
        "objective": estimate(policy.regularized(beta) - baseline.regularized(beta)),
    }


class Point(NamedTuple):
    """One evaluation on the way of a training run."""

    step: int
    kl: float  # nats
    reward: float  # above that of step 0, the policy that the run started from
    num_prompts: int


def read_points(folder: Path) -> list[Point]:
    """Evaluations of a training run, from its metrics.jsonl, all on the same prompts."""
    rows = [row for _, row in read_json_lines(folder / "metrics.jsonl") if isinstance(row, dict)]
    rows = [row for row in rows if row.get("eval/reward_mean") is not None]
    (zero,) = (row["eval/reward_mean"] for row in rows if row["step"] == 0)
    return [
        Point(
            step=row["step"],
            kl=row["eval/kl"],
            reward=row["eval/reward_mean"] - zero,
            num_prompts=int(row["eval/num_prompts"]),
        )
        for row in rows
    ]


@dataclass(frozen=True)
class Trained:
    """A method trained at one β: evaluations on the way, and the last one prompt by prompt."""

    method: str
    beta: float
    points: list[Point]
    policy: Policy


class Difference(NamedTuple):
    """Two methods, each at the β that is best for it, prompt by prompt."""

    first: Trained
    second: Trained
    gap: Estimate  # of the first above the second


def best_of_each(
    trained: Iterable[Trained], value: Callable[[Policy], np.ndarray]
) -> dict[str, Trained]:
    """Of each method the β with the highest mean of `value` (policy → [N])."""
    best: dict[str, Trained] = {}
    for one in trained:
        rival = best.get(one.method)
        mean = lambda trained: rank(estimate(value(trained.policy)).mean)
        if rival is None or mean(one) > mean(rival):
            best[one.method] = one
    return best


def differences(
    trained: Iterable[Trained], value: Callable[[Policy], np.ndarray]
) -> list[Difference]:
    """Paired differences of `value` (policy → [N]) between all methods, each at its best β."""
    return [
        Difference(a, b, estimate(value(a.policy) - value(b.policy)))
        for a, b in itertools.combinations(best_of_each(trained, value).values(), 2)
    ]


def pairwise_accuracy(function: RewardFn, labelled: Iterable[TextGroup | TokenGroup]) -> float:
    """Share of strictly ordered pairs of a labelled data set that a reward function orders the same
    way.

    Args:
        function: the reward function; a tie or None counts as wrong.
        labelled: groups whose `rewards` are the labels, e.g. human choices.
    """
    texts = [group for group in labelled if group.rewards is not None]
    prompts = [group.prompt for group in texts for _ in group.completions]
    completions = [text for group in texts for text in group.completions]
    names = sorted({name for group in texts for name in group.columns})
    columns = {
        name: [group.columns.get(name) for group in texts for _ in group.completions]
        for name in names
    }
    scores = iter(score_texts(function, prompts, completions, columns, name="reward"))
    right = total = 0
    for group in texts:
        labels = () if group.rewards is None else group.rewards
        pairs = list(zip(labels, [next(scores) for _ in labels], strict=True))
        for label, score in pairs:
            for other_label, other_score in pairs:
                if label is not None and other_label is not None and label > other_label:
                    total += 1
                    right += score > other_score
    return right / total if total else math.nan

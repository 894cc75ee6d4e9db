"""What an evaluation generates: completions with what was measured on them, and their averages."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from copg_jax.config.sections import GenerationConfig
from copg_jax.data.formats.texts import Text, content


@dataclass(frozen=True)
class Generation:
    """One generated completion with what was measured on it."""

    index: int  # of its prompt among the fixed ones
    id: str
    prompt: Text  # messages where those of the prompt's row are
    completion: Text
    reward: float  # the weighted sum; NaN where one of them is absent
    rewards: dict[str, float]  # each reward by its name; NaN where it is absent
    logp: float  # ln π, nats
    ref_logp: float  # ln π_ref, nats; NaN without a reference
    kl_k3: float  # k3 estimate, nats; NaN without a reference
    length: int  # tokens, the end token included
    has_eos: bool


def in_prompt_order(generations: Iterable[Generation]) -> list[Generation]:
    """The same generations as the prompts come, whatever the batches were."""
    return sorted(generations, key=lambda g: g.index)


def sample_texts(generations: Sequence[Generation], sizes: GenerationConfig) -> dict[str, str]:
    """The first completions of the first prompts, with their rewards, to look at.

    Args:
        generations: all of an evaluation, from `in_prompt_order`.
        sizes: numbers of samples and of texts.
    """
    shown = generations[:: sizes.num_samples][: sizes.num_texts]
    return {
        f"sample/{i}": f"[reward {g.reward:.3f}] {content(g.completion).strip()}"
        for i, g in enumerate(shown)
    }


def summarize(generations: Sequence[Generation], *, beta: float) -> dict[str, float]:
    """Averages of an evaluation.

    `eval/kl` is the k1 estimate E[ln π − ln π_ref], unbiased and possibly negative on few samples;
    `eval/kl_k3` sums k3 = exp(−d) − 1 + d over tokens, d = ln π − ln π_ref of the token, unbiased
    too and never negative. Both estimate KL(π‖π_ref) for samples of temperature 1. `eval/objective`
    is E[R] − β·`eval/kl`. Standard errors count samples of one prompt as one observation (their
    mean), since they are not independent.

    `eval/reward_mean` is of the weighted sum, `eval/reward/NAME` of the reward of that name, each
    with its standard error, `eval/reward_stderr` and `eval/reward_stderr/NAME`, over the samples
    that have it; `eval/dropped_rewards` and `eval/dropped_rewards/NAME` count the others.

    With several samples a prompt and a reference, `eval/residual` is E[(ΔR − βΔ)²] over pairs of
    samples of one prompt, squared reward units, Δ being the gap of ln π − ln π_ref: E[ΔR²] at
    π_ref, 0 at π*. (Not as a share of its own E[ΔR²], which falls as the policy grows surer.)

    Args:
        generations: from `GenerationEvaluator.batches`.
        beta: the paper's β.
    """
    prompts = [g.index for g in generations]
    mean, stderr, dropped = _mean_over_prompts(prompts, [g.reward for g in generations])
    kl = np.array([g.logp - g.ref_logp for g in generations]).mean()
    named = {}
    for name in generations[0].rewards:
        values = [g.rewards[name] for g in generations]
        own, error, absent = _mean_over_prompts(prompts, values)
        named |= {
            f"eval/reward/{name}": own,
            f"eval/reward_stderr/{name}": error,
            f"eval/dropped_rewards/{name}": absent,
        }
    return {
        "eval/reward_mean": mean,
        "eval/reward_stderr": stderr,
        "eval/kl": float(kl),
        "eval/kl_k3": float(np.mean([g.kl_k3 for g in generations])),
        "eval/objective": float(mean - beta * kl),
        "eval/length": float(np.mean([g.length for g in generations])),
        "eval/eos_rate": float(np.mean([g.has_eos for g in generations])),
        "eval/num_prompts": float(len({g.id for g in generations})),
        "eval/dropped_rewards": dropped,
        **named,
        **_residual(generations, beta),
    }


def _residual(generations: Sequence[Generation], beta: float) -> dict[str, float]:
    by_prompt: dict[int, list[Generation]] = {}
    for g in generations:
        by_prompt.setdefault(g.index, []).append(g)
    pairs = [pair for own in by_prompt.values() for pair in combinations(own, 2)]
    reward, ratio = (
        np.array([value(a) - value(b) for a, b in pairs])
        for value in (lambda g: g.reward, lambda g: g.logp - g.ref_logp)
    )
    known = np.isfinite(reward) & np.isfinite(ratio)
    if not known.any():
        return {}
    return {"eval/residual": float(np.square(reward - beta * ratio)[known].mean())}


def _mean_over_prompts(
    prompts: Sequence[int], values: Sequence[float]
) -> tuple[float, float, float]:
    """Mean of the prompts' means, its standard error, and how many values are absent (NaN)."""
    by_prompt: dict[int, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        if np.isfinite(value):
            by_prompt.setdefault(prompt, []).append(value)
    means = np.array([np.mean(known) for known in by_prompt.values()])
    num_absent = len(values) - sum(map(len, by_prompt.values()))
    if not len(means):
        return math.nan, math.nan, float(num_absent)
    stderr = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 else math.nan
    return float(means.mean()), float(stderr), float(num_absent)

"""What the runs of a study measured, and the numbers that its figures and tables show.

1. `read_outcome` reads one run: its evaluations on the way, and the last one prompt by prompt.
2. A `Curve` is one method at one β over its seeds; only one whose seeds are all done can be best.
3. `spread` and `paired` give means with two standard errors: over prompts, with the seeds of each
   prompt averaged, and over seeds, with the prompts of each seed averaged.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from scipy import stats

from copg_jax.config.sections import DataConfig
from copg_jax.config.stages import OnlineConfig, PolicyConfig
from copg_jax.data.reader import GroupReader
from copg_jax.errors import InputError
from copg_jax.files import read_json_lines
from copg_jax.pooled import scored_sections
from copg_jax.train.fresh import ROUNDS
from experiments.studies.axes import SEED, Values
from experiments.studies.comparison import AGAIN, Policy, read_policy
from experiments.studies.grid import Point
from experiments.studies.runner import DIVERGED, DONE

_OWN = "eval/reward/"  # begins the metric of a reward by its name
Ended = tuple[Point, str | None]
"""A run and how it ended, see `second_look.ended`."""


class Evaluation(NamedTuple):
    """One evaluation on the way of a training run."""

    step: int
    reward: float  # mean over prompts
    stderr: float  # of that mean, over prompts
    kl: float  # to π_ref, nats
    loss: float  # held-out; NaN without held-out data
    named: Mapping[str, float] = MappingProxyType({})  # name → that reward's mean
    # E[(ΔR − βΔ)²], which is 0 at π*; NaN without such pairs.
    residual_samples: float = math.nan  # of all pairs of its own samples of a prompt
    residual_held_out: float = math.nan  # of a prompt's best and worst, as a share of E[ΔR²]


@dataclass(frozen=True)
class Outcome:
    """What one run measured."""

    name: str
    group: str  # what else varies, see `Point.group`
    values: Values
    method: str
    beta: float
    seed: int
    steps: tuple[Evaluation, ...]
    final: Policy
    baseline: Policy  # π_ref on the same prompts


class Spread(NamedTuple):
    """A mean with its standard errors; NaN where there is one prompt, or one seed."""

    mean: float
    over_prompts: float
    over_seeds: float
    num_seeds: int
    num_prompts: int  # that have a number in all seeds

    @property
    def half_width(self) -> float:
        """Half of a 95 % interval, √((t s_prompts)² + (t s_seeds)²), where t is Student's factor
        for so many prompts, or seeds: 2.0 for 300, 4.3 for 3, 12.7 for 2, which hardly know their
        own error. With one seed it is of prompts alone; NaN where neither error is known.
        """
        samples = ((self.over_prompts, self.num_prompts), (self.over_seeds, self.num_seeds))
        parts = [
            float(stats.t.ppf(0.975, number - 1)) * error
            for error, number in samples
            if not math.isnan(error)
        ]
        return math.hypot(*parts) if parts else math.nan

    def __str__(self) -> str:
        seeds = "" if math.isnan(self.over_seeds) else f" ± {self.over_seeds:.3f}"
        return f"{round(self.mean, 3) + 0.0:.3f} ± {self.over_prompts:.3f}{seeds}"


@dataclass(frozen=True)
class Curve:
    """One method at one β."""

    method: str
    beta: float
    runs: tuple[Outcome, ...]  # one a seed that is done
    ends: tuple[str | None, ...]  # how each seed of the study ended, see `second_look.ended`

    @property
    def is_complete(self) -> bool:
        """Whether all of its seeds are done: where one diverged, the others are no fair sample."""
        return bool(self.ends) and all(end == DONE for end in self.ends)

    @property
    def num_diverged(self) -> int:
        """Seeds whose training had no finite loss or gradient."""
        return self.ends.count(DIVERGED)

    def over_steps(self, value: Callable[[Evaluation], float]) -> tuple[np.ndarray, np.ndarray]:
        """Steps [n] and a number of the evaluations at them, one row a run [runs, n]: the steps
        that all runs have.
        """
        tables = [{one.step: value(one) for one in run.steps} for run in self.runs]
        steps = sorted(set.intersection(*map(set, tables)))
        values = [[table[step] for step in steps] for table in tables]
        return np.array(steps), np.array(values, float)


def read_outcome(point: Point) -> Outcome:
    """Reads a run that is done.

    Raises:
        InputError: it has no evaluation by generation, or a file of it is gone.
    """
    config = point.policy.config
    path = epath.Path(config.output_dir) / "metrics.jsonl"
    if not path.exists():
        raise InputError(f"{path}: wanted the metrics of a run, got no file. {AGAIN}")
    rows = [row for _, row in read_json_lines(path) if isinstance(row, dict)]
    steps = tuple(
        Evaluation(
            row["step"],
            row["eval/reward_mean"],
            _number(row.get("eval/reward_stderr")),
            _number(row.get("eval/kl")),
            _number(row.get("eval/loss")),
            _named(row),
            _number(row.get("eval/residual")),
            1 - _number(row.get("eval/copg/reward_r2")),
        )
        for row in rows
        if row.get("eval/reward_mean") is not None
    )
    if not steps:
        raise InputError(
            f"{path}: wanted evaluations by generation, got none: a study draws their rewards. "
            "Fix: give policy an evaluation."
        )
    final, baseline = (
        read_policy(epath.Path(job.config.output_dir)) for job in (point.evaluation, point.baseline)
    )
    return Outcome(
        name=point.name,
        group=point.group,
        values=point.values,
        method=config.loss.name,
        beta=config.loss.beta,
        seed=config.seed,
        steps=steps,
        final=final,
        baseline=baseline,
    )


def _named(row: Mapping[str, Any]) -> Mapping[str, float]:
    found = {name: _number(row[name]) for name in row if name.startswith(_OWN)}
    return {name.removeprefix(_OWN): value for name, value in found.items() if len(found) > 1}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def read_curves(ended: Iterable[Ended]) -> list[Curve]:
    """The curves of one group of runs, each with how it ended; those that are done are read."""
    ends: dict[tuple[str, float], list[str | None]] = {}
    outcomes = []
    for point, end in ended:
        loss = point.policy.config.loss
        ends.setdefault((loss.name, loss.beta), []).append(end)
        outcomes += [read_outcome(point)] if end == DONE else []
    return curves(outcomes, ends)


def curves(
    outcomes: Iterable[Outcome], ends: Mapping[tuple[str, float], Sequence[str | None]]
) -> list[Curve]:
    """The runs by method and β, β ascending.

    Args:
        outcomes: of the runs that are done.
        ends: method and β → how each seed ended.
    """
    found: dict[tuple[str, float], list[Outcome]] = {key: [] for key in ends}
    for one in outcomes:
        found[one.method, one.beta].append(one)
    ordered = list(dict.fromkeys(method for method, _ in found))
    keys = sorted(found, key=lambda key: (ordered.index(key[0]), key[1]))
    by_seed = {key: tuple(sorted(found[key], key=lambda run: run.seed)) for key in keys}
    return [Curve(*key, by_seed[key], tuple(ends[key])) for key in keys]


def best_values(found: Sequence[Curve]) -> list[Values]:
    """Of each method the values at the β of the highest mean reward after training, over seeds;
    without the seed.
    """
    best = best_curves(found, lambda policy: policy.reward)
    return [{a: v for a, v in one.runs[0].values.items() if a != SEED} for one in best]


def best_curves(found: Sequence[Curve], value: Callable[[Policy], np.ndarray]) -> list[Curve]:
    """Of each method the curve with the highest mean of `value` (policy → one number a prompt)
    after training; only one with all its seeds, and with a number.
    """
    best: dict[str, tuple[float, Curve]] = {}
    for curve in found:
        if curve.is_complete and math.isfinite(mean := above_baseline(curve, value).mean):
            rival = best.get(curve.method)
            if rival is None or mean > rival[0]:
                best[curve.method] = mean, curve
    return [curve for _, curve in best.values()]


def spread(by_seed: Sequence[np.ndarray]) -> Spread:
    """The mean of one number a prompt and seed, with its standard errors.

    Args:
        by_seed: one array [N] a seed, of the same prompts; NaN where a prompt has no number.
    """
    values = np.stack([np.asarray(one, float) for one in by_seed])
    values = values[:, np.isfinite(values).all(0)]
    if not values.size:
        return Spread(math.nan, math.nan, math.nan, len(values), 0)
    over_prompts, over_seeds = stderr_of(values.mean(0)), stderr_of(values.mean(1))
    return Spread(float(values.mean()), over_prompts, over_seeds, *values.shape)


def stderr_of(values: np.ndarray) -> float:
    """Standard error of the mean of [n]; NaN of one value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def above_baseline(curve: Curve, value: Callable[[Policy], np.ndarray]) -> Spread:
    """What a curve ends at above π_ref, prompt by prompt; `value` is policy → one number a prompt.

    A Bradley–Terry reward is defined up to a constant only.
    """
    return spread([value(run.final) - value(run.baseline) for run in curve.runs])


def paired(first: Curve, second: Curve, value: Callable[[Policy], np.ndarray]) -> Spread:
    """The difference of two curves, prompt by prompt and seed by seed: what makes a prompt easy, or
    an order lucky, for both cancels.

    Args:
        first: minuend.
        second: subtrahend.
        value: policy → one number a prompt, [N].
    """
    others = {run.seed: run.final for run in second.runs}
    runs = [run for run in first.runs if run.seed in others]
    gaps = [value(run.final) - value(others[run.seed]) for run in runs]
    return spread(gaps or [np.array([])])


def reward_gap_sd(config: PolicyConfig | OnlineConfig) -> float:
    """Standard deviation of ΔR, the difference of the rewards of two completions of one prompt, in
    what a policy was trained on; online in the first round, and NaN where its folder is gone.

    ΔR is as often this as its opposite, so it is √E[ΔR²]; over all pairs of all groups, of all
    sources where there are several.
    """
    section: DataConfig = config.data
    if isinstance(config, OnlineConfig):
        first = epath.Path(config.output_dir) / ROUNDS / "00000" / "scored"
        if not first.exists():
            return math.nan
        section = DataConfig(path=str(first))
    squares: list[float] = []
    for group in chain.from_iterable(map(GroupReader, scored_sections(section))):
        rewards: list[Any] = (
            []
            if group.rewards is None
            else [r for r in group.rewards if r is not None and not math.isnan(r)]
        )
        squares += [(a - b) ** 2 for a, b in combinations(rewards, 2)]
    return math.sqrt(np.mean(squares)) if squares else math.nan

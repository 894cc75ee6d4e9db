"""Runs beside each other at equal KL: what training had given by the time it had paid so much.

1. `rows_at_kl` reads every curve of every group at a few KL, and at its best step, which is what
   stopping early by the reward of generations gives.
2. `to_markdown` and `paths_figure` show them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from operator import attrgetter

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.studies import tables
from experiments.studies.outcomes import Curve, Evaluation, Outcome, stderr_of
from experiments.studies.pictures import root
from experiments.studies.tables import Row, label

LEVELS = (0.3, 1.0, 3.0, 10.0)
"""Nats; those that no run reaches are left out."""
BEST = "best step"
_WIDEST = 4  # an evaluation that is further than so many times a KL says nothing about it
Measure = Callable[[Evaluation], float]
Groups = Mapping[str, Sequence[Curve]]


def measures(groups: Groups) -> dict[str, Measure]:
    """What may be compared: the evaluated reward, and those by name that differ from it, each if
    its zero, π_ref's on the same prompts, is the same in all groups.
    """
    runs = [run for curves in groups.values() for curve in curves for run in curve.runs]
    found: dict[str, Measure] = {}
    if _is_same([run.baseline.reward for run in runs]):
        found["reward"] = attrgetter("reward")
    for name in dict.fromkeys(name for run in runs for name in run.baseline.named):
        own = tables.reward_of(name)
        zeros = [run.baseline.named.get(name, np.array([math.nan])) for run in runs]
        ways = np.array([(own(one), one.reward) for run in runs for one in run.steps])
        if _is_same(zeros) and not ("reward" in found and np.allclose(ways[:, 0], ways[:, 1])):
            found[name] = own
    return found


def _is_same(zeros: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(zero, zeros[0], equal_nan=True) for zero in zeros)


def rows_at_kl(groups: Groups) -> list[Row]:
    """A row for each measure, curve and KL, of rewards above those of step 0.

    Returns:
        Rows with the measure (`of`), group, method, β, `at` (nats, or `BEST`), the mean over the
        seeds that got there, its standard error over seeds, the mean `step` and `kl`, how many of
        all seeds got there, and `reward_se_prompts`, the error of one evaluation over its prompts.
    """
    rows = []
    for measure, value in measures(groups).items():
        for group, curves in groups.items():
            for curve in curves:
                head = {"of": measure, "group": group, "method": curve.method, "beta": curve.beta}
                ways = [run.steps for run in curve.runs]
                errors = {
                    "reward_se_prompts": _error(curve.runs) if measure == "reward" else math.nan
                }
                rows.append(
                    head | {"at": BEST} | _averaged([_best(w, value) for w in ways]) | errors
                )
                for level in LEVELS:
                    found = [_crossing(way, value, level) for way in ways]
                    rows.append(head | {"at": level} | _averaged(found) | errors)
    reached = {row["at"] for row in rows if row["num_reached"]}
    return [row for row in rows if row["at"] in reached]


def _error(runs: Sequence[Outcome]) -> float:
    return float(np.sqrt(np.mean([one.stderr**2 for run in runs for one in run.steps])))


def _best(way: Sequence[Evaluation], value: Measure) -> tuple[float, float, float]:
    """Reward above step 0, step and KL at the step of the highest evaluated reward."""
    best = max(way, key=lambda one: one.reward)
    return value(best) - value(way[0]), best.step, best.kl


def _crossing(
    way: Sequence[Evaluation], value: Measure, level: float
) -> tuple[float, float, float] | None:
    """The same where a run first has this KL, on a line in √KL between its evaluations; None where
    it never has, or jumps over it.
    """
    for before, after in pairwise(way):
        if before.kl < level <= after.kl:
            low, at, high = root([before.kl, level, after.kl])
            part = (at - low) / (high - low)
            reward = (1 - part) * value(before) + part * value(after)
            step = (1 - part) * before.step + part * after.step
            is_near = after.kl <= _WIDEST * level
            return (reward - value(way[0]), step, level) if is_near else None
    return None


def _averaged(found: Sequence[tuple[float, float, float] | None]) -> Row:
    """Over the runs that got there."""
    known = np.array([one for one in found if one is not None], float).reshape(-1, 3)
    reward, step, kl = known.mean(0) if len(known) else [math.nan] * 3
    return {
        "reward": float(reward),
        "reward_se_seeds": stderr_of(known[:, 0]),
        "step": float(step),
        "kl": float(kl),
        "num_reached": len(known),
        "num_seeds": len(found),
    }


def to_markdown(rows: Sequence[Row]) -> str:
    """The rows as one table a measure."""
    errors = [e for row in rows if not math.isnan(e := row["reward_se_prompts"])]
    error = max(errors, default=None)
    levels = [at for at in dict.fromkeys(row["at"] for row in rows) if at != BEST]
    lines = []
    for measure in dict.fromkeys(row["of"] for row in rows):
        own = [row for row in rows if row["of"] == measure]
        heads = ["group", "method", "β", f"{measure} at the best step", "that step", "its KL, nats"]
        heads += [f"{measure} at {level:g} nats" for level in levels]
        lines += [tables.line(heads), "|" + "---|" * len(heads)]
        for best in (row for row in own if row["at"] == BEST):
            same = {row["at"]: row for row in own if _is_same_curve(row, best)}
            cells = [best["group"] or "all", label(best["method"]), f"{best['beta']:g}"]
            cells += [_shown(best), f"{best['step']:.0f}", f"{best['kl']:.2f}"]
            lines.append(tables.line([*cells, *(_shown(same[level]) for level in levels)]))
        lines.append("")
    lines += [
        "Rewards above those of step 0, on the prompts of evaluations on the way; ± standard error "
        "over seeds alone, which share these prompts"
        + (f" (one evaluation has {error:.3f} over prompts)." if error else ".")
        + " Read off where each run first has this KL, on a line in √KL; (n/m): of m seeds n have "
        "evaluations near it, which are no fair sample of all. The best step of a run is that of "
        "its highest evaluated reward, chosen on these prompts, so that it is too high.",
        "",
    ]
    return "\n".join(lines)


def _is_same_curve(one: Row, other: Row) -> bool:
    return all(one[name] == other[name] for name in ("group", "method", "beta"))


def _shown(row: Row) -> str:
    if math.isnan(row["reward"]):
        return ""
    error = row["reward_se_seeds"]
    text = f"{row['reward']:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")
    is_all = row["num_reached"] == row["num_seeds"]
    return text if is_all else f"{text} ({row['num_reached']}/{row['num_seeds']})"


def paths_figure(groups: Groups) -> Figure:
    """Each measure against KL along training, means over seeds: a panel a method and β, a curve a
    group. Rewards that differ by group are each in units of the standard deviation
    of π_ref's over prompts.
    """
    names = {f"{name} above step 0": (value, False) for name, value in measures(groups).items()}
    if "reward above step 0" not in names:
        own = "own reward above step 0,\nin s.d. of π_ref's over prompts"
        names = {own: (attrgetter("reward"), True), **names}
    kinds = list(dict.fromkeys((c.method, c.beta) for own in groups.values() for c in own))
    shades = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(groups)))
    colours = dict(zip(groups, shades, strict=True))
    size = (2.2 + 3.6 * len(kinds), 0.8 + 3.2 * len(names))
    figure, panels = plt.subplots(
        len(names), len(kinds), figsize=size, layout="constrained", squeeze=False
    )
    drawn = {}
    for line, (measure, (value, is_scaled)) in zip(panels, names.items(), strict=True):
        for axes, (method, beta) in zip(line, kinds, strict=True):
            for group, curves in groups.items():
                for curve in (c for c in curves if (c.method, c.beta) == (method, beta)):
                    kl, reward = (curve.over_steps(one)[1] for one in (attrgetter("kl"), value))
                    x = root(kl.mean(0))
                    units = [
                        np.nanstd(run.baseline.reward) if is_scaled else 1.0 for run in curve.runs
                    ]
                    y = ((reward - reward[:, :1]) / np.array(units)[:, None]).mean(0)
                    (drawn[group],) = axes.plot(x, y, color=colours[group], lw=1.3)
                    axes.plot(x[-1:], y[-1:], "o", ms=4, color=colours[group])
            axes.axhline(0, color="#888888", lw=0.8)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"{label(method)}, β = {beta:g}", fontsize=10)
        line[0].set_ylabel(measure)
    for axes in panels[-1]:
        axes.set_xlabel("√KL to π_ref (√nats)")
    shown = [group for group in groups if group in drawn]
    figure.legend([drawn[group] for group in shown], shown, fontsize=8, loc="outside right center")
    return figure

"""The numbers of a study's figures, as rows: what a CSV file holds and what a picture draws."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from operator import attrgetter
from typing import Any

import numpy as np

from experiments.studies.comparison import Policy, rank
from experiments.studies.outcomes import (
    Curve,
    Evaluation,
    Spread,
    above_baseline,
    paired,
    spread,
    stderr_of,
)
from experiments.studies.regret_figure import LABELS

Row = dict[str, Any]
RESIDUALS = ("residual_held_out", "residual_samples")  # fields of an evaluation
NAMED = "reward/"  # begins the columns of a reward by its name
INTERVAL = (
    "In brackets: half a 95 % interval, the root of both errors squared and added, each times "
    "Student's factor for its number of prompts, or seeds."
)


def rows_over_steps(curves: Sequence[Curve]) -> list[Row]:
    """Each curve step by step, means over seeds: rewards as they are, whose standard error is
    known, and above those of step 0; losses above those of step 0.

    The standard error over prompts is that of one seed: seeds share their prompts.
    """
    rows = []
    for curve in curves:
        steps, reward = curve.over_steps(attrgetter("reward"))
        gain = reward - reward[:, :1]
        stderr, kl, loss = (curve.over_steps(attrgetter(x))[1] for x in ("stderr", "kl", "loss"))
        residuals = {name: curve.over_steps(attrgetter(name))[1] for name in RESIDUALS}
        residuals = {name: own / own[:, :1] for name, own in residuals.items()}  # 1 at π_ref
        loss = loss - loss[:, :1]
        by_name = {name: curve.over_steps(reward_of(name))[1] for name in names_of(curve)}
        for i, step in enumerate(steps):
            rows.append(
                {
                    "method": curve.method,
                    "beta": curve.beta,
                    "step": int(step),
                    "reward": float(reward[:, i].mean()),
                    "reward_se_prompts": float(np.sqrt((stderr[:, i] ** 2).mean())),
                    "reward_se_seeds": stderr_of(reward[:, i]),
                    "reward_above_start": float(gain[:, i].mean()),
                    "kl": float(kl[:, i].mean()),
                    "held_out_loss": float(loss[:, i].mean()),
                    "held_out_loss_se_seeds": stderr_of(loss[:, i]),
                    **{name: float(own[:, i].mean()) for name, own in residuals.items()},
                    "num_seeds": len(curve.runs),
                    **{
                        f"{NAMED}{name}_above_start": float((own[:, i] - own[:, 0]).mean())
                        for name, own in by_name.items()
                    },
                }
            )
    return rows


def names_of(curve: Curve) -> list[str]:
    """The rewards that were measured beside their sum, `Policy.named`."""
    return list(curve.runs[0].final.named)


def named(name: str) -> Callable[[Policy], np.ndarray]:
    """Of a policy the reward of this name, one number a prompt; NaN where it has none."""
    return lambda policy: policy.named.get(name, np.full(len(policy.reward), math.nan))


def reward_of(name: str) -> Callable[[Evaluation], float]:
    """Of an evaluation on the way the mean reward of this name."""
    return lambda evaluation: evaluation.named.get(name, math.nan)


def rows_by_beta(curves: Sequence[Curve], *, beta: float, sd: float) -> list[Row]:
    """Where each curve ends: reward and J above those of π_ref, and KL.

    Args:
        curves: methods and β.
        beta: β of J = E[R] − β·KL, the same for all.
        sd: standard deviation of ΔR, reward units; β is given in units of it as well.
    """
    rows = []
    for curve in curves:
        found = {
            "reward": above_baseline(curve, lambda policy: policy.reward),
            "kl": spread([run.final.log_ratio for run in curve.runs]),
            "objective": above_baseline(curve, lambda policy: policy.regularized(beta)),
        }
        row: Row = {"method": curve.method, "beta": curve.beta, "beta_in_sd": curve.beta / sd}
        for name in names_of(curve):
            found[f"{NAMED}{name}"] = above_baseline(curve, named(name))
        for name, value in found.items():
            row |= columns(name, value)
        row["prompts_without_reward"] = (
            len(curve.runs[0].final.reward) - found["reward"].num_prompts
        )
        row["length"] = float(np.mean([run.final.length.mean() for run in curve.runs]))
        row["eos_rate"] = float(np.mean([run.final.eos_rate.mean() for run in curve.runs]))
        row["repetition"] = float(np.mean([run.final.repetition.mean() for run in curve.runs]))
        row |= {"num_seeds": len(curve.runs), "num_planned": len(curve.ends)}
        rows.append(row | {"num_diverged": curve.num_diverged, "complete": curve.is_complete})
    return rows


def columns(name: str, value: Spread) -> Row:
    """A mean, its standard errors and half its 95 % interval, as columns."""
    return {
        name: value.mean,
        f"{name}_se_prompts": value.over_prompts,
        f"{name}_se_seeds": value.over_seeds,
        f"{name}_half_width": value.half_width,
    }


def measures(beta: float) -> Mapping[str, Callable[[Policy], np.ndarray]]:
    """By what methods are compared: policy → one number a prompt."""
    return {
        "reward": lambda policy: policy.reward,
        "objective": lambda policy: policy.regularized(beta),
    }


def rows_of_differences(best: Mapping[str, Sequence[Curve]], *, beta: float) -> list[Row]:
    """Paired differences of every two methods.

    Args:
        best: for reward and for J, the curve of each method that is best in it.
        beta: of J.
    """
    rows = []
    for name, value in measures(beta).items():
        for first, second in combinations(best[name], 2):
            gap = paired(first, second, value)
            rows.append(
                {
                    "of": name,
                    "first": first.method,
                    "first_beta": first.beta,
                    "second": second.method,
                    "second_beta": second.beta,
                    **columns("difference", gap),
                    "num_seeds": gap.num_seeds,
                    "num_prompts": gap.num_prompts,
                }
            )
    return rows


def to_csv(rows: Sequence[Row]) -> str:
    """Rows with one header, as CSV; numbers with all their digits, nothing for NaN or no value."""
    stream = io.StringIO()
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return stream.getvalue()


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value


def to_markdown(
    by_beta: Sequence[Row], differences: Sequence[Row], *, beta: float, num_prompts: int
) -> str:
    """Where every method and β ends, and paired differences at the best β of each.

    Args:
        by_beta: from `rows_by_beta`.
        differences: from `rows_of_differences`.
        beta: of J.
        num_prompts: of the runs over β.
    """
    objective = f"J = E[R] − {beta:g}·KL"
    names = named_columns(by_beta)
    heads = ["method", "β", "β / s.d. of ΔR", "reward above π_ref"]
    heads += [f"{name.removeprefix(NAMED)} alone" for name in names]
    heads += ["KL, nats", f"{objective} above π_ref", "length", "EOS", "repeats", "seeds"]
    lines = [line([*heads, "prompts without reward"]), "|" + "---|" * (len(heads) + 1)]
    for row in by_beta:
        reward, objective = (
            shown(row, name) + "*" * _is_best(row, name, by_beta)
            for name in ("reward", "objective")
        )
        in_sd = "" if math.isnan(row["beta_in_sd"]) else f"{row['beta_in_sd']:.3g}"
        cells = [label(row["method"]), f"{row['beta']:g}", in_sd, reward]
        cells += [shown(row, name) for name in names]
        cells += [shown(row, "kl"), objective, f"{row['length']:.1f}", f"{row['eos_rate']:.2f}"]
        cells += [f"{row['repetition']:.2f}"]
        lines.append(line([*cells, seeds(row), str(row["prompts_without_reward"])]))
    lines += [
        "",
        "| of | methods at their best β | difference (95 %) | prompts | seeds | told apart |",
        "|---|---|---|---|---|---|",
    ]
    for row in differences:
        names = (f"{label(row[one])} {row[f'{one}_beta']:g}" for one in ("first", "second"))
        of = "reward" if row["of"] == "reward" else "J"
        cells = [of, " − ".join(names), shown_difference(row, "difference")]
        cells += [str(row["num_prompts"]), str(row["num_seeds"]), _told(row)]
        lines.append(line(cells))
    lines += [
        "",
        f"Over β: {num_prompts} prompts; ± standard error over prompts, then over seeds; a prompt "
        "without a reward in one seed is left out. Differences are paired: same prompts, same "
        "seeds. * the best β of a method, chosen on these same prompts, of those whose seeds are "
        f"all done. {INTERVAL} A difference within it is a tie; one seed says nothing of others.",
        "",
    ]
    return "\n".join(lines)


def named_columns(rows: Sequence[Row]) -> list[str]:
    """The columns of rewards by their names."""
    found = dict.fromkeys(name for row in rows for name in row if name.startswith(NAMED))
    ends = ("_se_prompts", "_se_seeds", "_half_width")
    return [name for name in found if not name.endswith(ends)]


def line(cells: Sequence[str]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def _is_best(row: Row, name: str, rows: Sequence[Row]) -> bool:
    """Whether a row's β is the best of its method, as `outcomes.best_curves` chooses."""
    rivals = [r[name] for r in rows if r["method"] == row["method"] and r["complete"]]
    return row["complete"] and row[name] == max(map(rank, rivals))


def seeds(row: Row) -> str:
    """How many seeds a row has, and what became of the others."""
    if row["complete"]:
        return str(row["num_seeds"])
    diverged = f", {row['num_diverged']} diverged" if row["num_diverged"] else ""
    return f"{row['num_seeds']} of {row['num_planned']}{diverged}"


def lost(curves: Sequence[Curve]) -> str:
    """A sentence about the methods and β of which no seed is done; empty where there are none."""
    names = [
        f"{label(one.method)} {one.beta:g} ({one.num_diverged} of {len(one.ends)} diverged)"
        for one in curves
        if not one.runs
    ]
    return f"No seed is done of {', '.join(names)}." if names else ""


def label(method: str) -> str:
    """Name of a method for people."""
    return LABELS.get(method, method)


def shown(row: Row, name: str) -> str:
    """A mean with its standard errors, over prompts and then over seeds; nothing for NaN."""
    if math.isnan(row.get(name, math.nan)):
        return ""
    parts = [row[f"{name}_se_prompts"], row[f"{name}_se_seeds"]]
    errors = "".join(f" ± {part:.3f}" for part in parts if not math.isnan(part))
    return f"{round(row[name], 3) + 0.0:.3f}{errors}"  # no "-0.000"


def total_stderr(row: Row, name: str) -> float:
    """√(s_prompts² + s_seeds²): prompts and seeds are both samples; NaN where neither is known."""
    known = [e for e in (row[f"{name}_se_prompts"], row[f"{name}_se_seeds"]) if not math.isnan(e)]
    return math.hypot(*known) if known else math.nan


def shown_difference(row: Row, name: str) -> str:
    """A difference with its standard errors and, in brackets, half its 95 % interval; nothing for
    NaN.
    """
    text, width = shown(row, name), row.get(f"{name}_half_width", math.nan)
    return text if math.isnan(width) else f"{text} ({width:.3f})"


def _told(row: Row) -> str:
    """Whether a difference leaves its interval."""
    gap, width = abs(row["difference"]), row["difference_half_width"]
    if math.isnan(gap) or math.isnan(width):
        return "not known"
    if gap <= width:
        return "tie"
    return "yes" if row["num_seeds"] > 1 else "over prompts"

"""The numbers of a study's figures, as rows: what a CSV file holds and what a picture draws."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from experiments.studies.comparison import TIE_STDERRS, Policy
from experiments.studies.outcomes import Curve, Spread, above_baseline, paired, spread
from experiments.studies.regret_figure import LABELS

Row = dict[str, Any]


def rows_over_steps(curves: Sequence[Curve]) -> list[Row]:
    """Each curve step by step, means over seeds; rewards and losses above those of step 0.

    The standard error over prompts is that of one seed: seeds share their prompts.
    """
    rows = []
    for curve in curves:
        steps, reward = curve.over_steps("reward")
        reward = reward - reward[:, :1]
        stderr, kl, loss = (curve.over_steps(name)[1] for name in ("stderr", "kl", "loss"))
        loss = loss - loss[:, :1]
        for i, step in enumerate(steps):
            rows.append(
                {
                    "method": curve.method,
                    "beta": curve.beta,
                    "step": int(step),
                    "reward": float(reward[:, i].mean()),
                    "reward_se_prompts": float(np.sqrt((stderr[:, i] ** 2).mean())),
                    "reward_se_seeds": _stderr(reward[:, i]),
                    "kl": float(kl[:, i].mean()),
                    "held_out_loss": float(loss[:, i].mean()),
                    "held_out_loss_se_seeds": _stderr(loss[:, i]),
                    "num_seeds": len(curve.runs),
                }
            )
    return rows


def _stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


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
        for name, value in found.items():
            row |= _columns(name, value)
        row["length"] = float(np.mean([run.final.length.mean() for run in curve.runs]))
        row["eos_rate"] = float(np.mean([run.final.eos_rate.mean() for run in curve.runs]))
        rows.append(row | {"num_seeds": len(curve.runs)})
    return rows


def _columns(name: str, value: Spread) -> Row:
    return {
        name: value.mean,
        f"{name}_se_prompts": value.over_prompts,
        f"{name}_se_seeds": value.over_seeds,
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
                    **_columns("difference", gap),
                    "num_seeds": gap.num_seeds,
                }
            )
    return rows


def to_csv(rows: Sequence[Row]) -> str:
    """Rows with one header, as CSV; numbers with all their digits, nothing for NaN."""
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return stream.getvalue()


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value


def to_markdown(
    by_beta: Sequence[Row], differences: Sequence[Row], *, beta: float, num_prompts: int
) -> str:
    """Where every method and β ends, and paired differences at the best β of each."""
    objective = f"J = E[R] − {beta:g}·KL"
    lines = [
        "| method | β | β / s.d. of ΔR | reward above π_ref | KL, nats | "
        f"{objective} above π_ref | length | EOS |",
        "|---|---|---|---|---|---|---|---|",
    ]
    best = {
        (name, row["method"]): max(
            (r[name] for r in by_beta if r["method"] == row["method"] and r[name] == r[name]),
            default=math.nan,
        )
        for row in by_beta
        for name in ("reward", "objective")
    }
    for row in by_beta:
        reward, objective = (
            _shown(row, name) + "*" * (row[name] == best[name, row["method"]])
            for name in ("reward", "objective")
        )
        lines.append(
            f"| {label(row['method'])} | {row['beta']:g} | {row['beta_in_sd']:.3g} | {reward} | "
            f"{_shown(row, 'kl')} | {objective} | {row['length']:.1f} | {row['eos_rate']:.2f} |"
        )
    lines += ["", "| of | methods at their best β | difference | told apart |", "|---|---|---|---|"]
    for row in differences:
        names = (f"{label(row[one])} {row[f'{one}_beta']:g}" for one in ("first", "second"))
        of = "reward" if row["of"] == "reward" else "J"
        lines.append(f"| {of} | {' − '.join(names)} | {_shown(row, 'difference')} | {_told(row)} |")
    seeds = max((row["num_seeds"] for row in by_beta), default=0)
    lines += [
        "",
        f"{num_prompts} prompts, up to {seeds} seeds; ± standard error over prompts, then over "
        "seeds. Differences are paired: same prompts, same seeds. * the best β of a method, chosen "
        f"on these same prompts. Less than {TIE_STDERRS:g} standard errors (the larger of the two) "
        "are a tie.",
        "",
    ]
    return "\n".join(lines)


def label(method: str) -> str:
    """Name of a method for people."""
    return LABELS.get(method, method)


def _shown(row: Row, name: str) -> str:
    parts = [row[f"{name}_se_prompts"], row[f"{name}_se_seeds"]]
    errors = "".join(f" ± {part:.3f}" for part in parts if not math.isnan(part))
    return f"{round(row[name], 3) + 0.0:.3f}{errors}"  # no "-0.000"


def _told(row: Row) -> str:
    stderr = np.nanmax([row["difference_se_prompts"], row["difference_se_seeds"], 0.0])
    if abs(row["difference"]) < TIE_STDERRS * stderr:
        return "tie"
    return f"by {abs(row['difference']) / stderr:.1f} standard errors" if stderr else "yes"

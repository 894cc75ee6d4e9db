"""Groups of runs beside each other: what a setting does, at the same method and β.

1. `rows_by_group`: where each curve of each group ends, and how far from its like in the first
   group, prompt by prompt and seed by seed.
2. `to_markdown` and `groups_figure` show them, and `front_figure` two rewards of each.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.studies import tables
from experiments.studies.comparison import Policy
from experiments.studies.outcomes import Curve, paired, spread
from experiments.studies.pictures import errors, linear_above_collapse
from experiments.studies.tables import Row, label, shown

CHANGE = "change/"  # begins the columns of paired differences
_FAR = 8.0  # nats; where a run is farther, the others would lie on each other
_PANELS = ("reward", "kl", "objective")


def rows_by_group(groups: Mapping[str, Sequence[Curve]], *, beta: float) -> list[Row]:
    """A row for each curve of each group.

    Args:
        groups: name → its curves that have runs.
        beta: of J = E[R] − β·KL, the same for all.

    Returns:
        The rows of `tables.rows_by_beta` with `group`, and for reward, J and each reward by name
        with `change/...`: the paired difference from the curve of the same method and β in the
        first group. NaN where that has none, or π_ref has other rewards there.
    """
    first = {(curve.method, curve.beta): curve for curve in next(iter(groups.values()))}
    rows = []
    for name, curves in groups.items():
        ends = tables.rows_by_beta(curves, beta=beta, sd=math.nan)
        for curve, row in zip(curves, ends, strict=True):
            row.pop("beta_in_sd")
            like = first.get((curve.method, curve.beta))
            for of, value in tables.measures(beta).items():
                row |= _change(of, curve, like, value, zero=lambda policy: policy.reward)
            for of in tables.names_of(curve):
                own = tables.named(of)
                row |= _change(f"{tables.NAMED}{of}", curve, like, own, zero=own)
            rows.append({"group": name, **row})
    return rows


def _change(
    of: str,
    curve: Curve,
    like: Curve | None,
    value: Callable[[Policy], np.ndarray],
    *,
    zero: Callable[[Policy], np.ndarray],
) -> Row:
    """How far a curve ends from its like; NaN where that is itself or none, or where π_ref has
    another `zero`.
    """
    name = f"{CHANGE}{of}"
    if like is None or like is curve or not _is_same_zero(curve, like, zero):
        return tables.columns(name, spread([np.array([])]))
    return tables.columns(name, paired(curve, like, value))


def _is_same_zero(one: Curve, other: Curve, zero: Callable[[Policy], np.ndarray]) -> bool:
    zeros = (zero(curve.runs[0].baseline) for curve in (one, other))
    return np.array_equal(*zeros, equal_nan=True)


def to_markdown(rows: Sequence[Row], *, beta: float) -> str:
    """The rows as a table for people."""
    named = tables.named_columns(rows)
    changes = [f"{CHANGE}{name}" for name in ("reward", *named, "objective")]
    heads = ["group", "method", "β", "reward above π_ref"]
    heads += [f"{_bare(name)} alone" for name in named]
    heads += [
        "KL, nats",
        f"J = E[R] − {beta:g}·KL above π_ref",
        "length",
        "EOS",
        "repeats",
        "seeds",
    ]
    heads += [f"{name}: change" for name in ("reward", *map(_bare, named), "J")]
    lines = [tables.line(heads), "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["group"], label(row["method"]), f"{row['beta']:g}", shown(row, "reward")]
        cells += [shown(row, name) for name in (*named, "kl", "objective")]
        cells += [f"{row['length']:.1f}", f"{row['eos_rate']:.2f}", f"{row['repetition']:.2f}"]
        cells += [tables.seeds(row)]
        lines.append(tables.line(cells + [tables.shown_difference(row, x) for x in changes]))
    lines += [
        "",
        f"± standard error over prompts, then over seeds. Changes are from {rows[0]['group']} at "
        "the same method and β, paired by prompt and seed; none where π_ref has other rewards "
        f"there. {tables.INTERVAL}",
        "",
    ]
    return "\n".join(lines)


def _bare(name: str) -> str:
    return name.removeprefix(tables.NAMED)


def groups_figure(rows: Sequence[Row], *, beta: float) -> Figure:
    """Reward, KL and J of every group at its end, a line a row and a colour a method and β."""
    names = list(dict.fromkeys(row["group"] for row in rows))
    kinds = list(dict.fromkeys((row["method"], row["beta"]) for row in rows))
    found = {(row["group"], (row["method"], row["beta"])) for row in rows}
    lines = [(name, kind) for name in names for kind in kinds if (name, kind) in found]
    # A line high, and a line between two groups.
    place = {line: i + names.index(line[0]) for i, line in enumerate(lines)}
    colours = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(kinds)))
    height = 1.6 + 0.14 * (len(lines) + len(names))
    figure, panels = plt.subplots(1, 3, figsize=(13, height), layout="constrained", sharey=True)
    for axes, name in zip(panels, _PANELS, strict=True):
        for kind, colour in zip(kinds, colours, strict=True):
            own = [row for row in rows if (row["method"], row["beta"]) == kind]
            axes.errorbar(
                [row[name] for row in own],
                [place[row["group"], kind] for row in own],
                xerr=errors(own, name),
                fmt="o", ms=4, capsize=2, color=colour, label=f"{label(kind[0])} {kind[1]:g}",
            )  # fmt: skip
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    ticks = [np.mean([y for line, y in place.items() if line[0] == name]) for name in names]
    panels[0].set_yticks(ticks, names)
    panels[0].set_ylim(max(place.values()) + 1, -1)
    panels[0].set_xlabel("reward above π_ref")
    panels[1].set_xlabel("KL to π_ref, nats")
    if max(row["kl"] for row in rows) > _FAR:
        panels[1].set_xscale("symlog")
        panels[1].set_xlim(left=min(0.0, *(row["kl"] for row in rows)) - 0.1)  # none is far below 0
    panels[2].set_xlabel(f"J = E[R] − {beta:g}·KL above π_ref")
    if linear := linear_above_collapse([row["objective"] for row in rows]):
        panels[2].set_xscale("symlog", linthresh=linear)
    panels[2].legend(title="method, β", fontsize=8, title_fontsize=8, loc="center left",
                     bbox_to_anchor=(1.02, 0.5))  # fmt: skip
    return figure


def front_figure(rows: Sequence[Row], first: str, second: str) -> Figure:
    """Where each group ends in two rewards that were measured by name: what more of one costs of
    the other.

    Args:
        rows: from `rows_by_group`.
        first: name of a reward, to the right.
        second: name of another, upwards.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    kinds = list(dict.fromkeys((row["method"], row["beta"]) for row in rows))
    for kind in kinds:
        own = [row for row in rows if (row["method"], row["beta"]) == kind]
        x, y = (f"{tables.NAMED}{name}" for name in (first, second))
        known = [row for row in own if not math.isnan(row.get(x, math.nan) + row.get(y, math.nan))]
        xs, ys = ([row[name] for row in known] for name in (x, y))
        axes.errorbar(
            xs, ys, xerr=errors(known, x), yerr=errors(known, y), fmt="o", ms=4, capsize=2,
            label=f"{label(kind[0])}, β = {kind[1]:g}",
        )  # fmt: skip
        for row, at in zip(known, zip(xs, ys, strict=True), strict=True):
            axes.annotate(
                row["group"].removeprefix("arm_"), at, fontsize=8, xytext=(5, 5),
                textcoords="offset points",
            )  # fmt: skip
    axes.axhline(0, color="#888888", lw=0.8)
    axes.axvline(0, color="#888888", lw=0.8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel=f"{first} above π_ref", ylabel=f"{second} above π_ref")
    axes.legend(fontsize=8)
    return figure

"""The pictures of a study, each drawn from the rows of its CSV file.

A method has a colour where methods are compared, and a β has one where they are curves of a method.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.studies.comparison import rank
from experiments.studies.regret_figure import COLOURS
from experiments.studies.tables import NAMED, Row, label, total_stderr

_OTHERS = ("#F0E442", "#000000", "#999999", "#7F3C8D", "#11A579")  # of losses without a colour
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def curves_figure(rows: Sequence[Row]) -> Figure:
    """Reward of generations over steps, a curve a β and a panel a method (paper: Figs. 2–4)."""
    methods = _methods(rows)
    figure, panels = _panels(1, len(methods), sharey=True)
    for axes, method in zip(panels[0], methods, strict=True):
        _draw_betas(axes, [row for row in rows if row["method"] == method], "reward")
        axes.set(title=label(method), xlabel="training step")
        axes.legend(title="β", fontsize=8, title_fontsize=8)
    panels[0][0].set_ylabel("reward of generations")
    figure.suptitle(f"held-out prompts, {_seeds(rows)}", fontsize=10)
    return figure


def beta_figure(rows: Sequence[Row]) -> Figure:
    """Reward after training as a function of β, and of β in units of the s.d. of ΔR (Fig. 5)."""
    names = ["beta", *(["beta_in_sd"] if _in_sd(rows) else [])]
    figure, panels = _panels(1, len(names), sharey=True)
    for axes, name in zip(panels[0], names, strict=True):
        for method in _methods(rows):
            own = [row for row in rows if row["method"] == method]
            x, y = ([row[key] for row in own] for key in (name, "reward"))
            look = _look(method, rows)
            axes.errorbar(x, y, yerr=errors(own, "reward"), capsize=3, label=label(method), **look)
        log_scale(axes)
    panels[0][0].set(xlabel="β (reward units)", ylabel="final reward above π_ref")
    panels[0][-1].set(xlabel="β / s.d. of ΔR" if _in_sd(rows) else "β (reward units)")
    panels[0][0].legend()
    figure.suptitle(f"± standard error over prompts and seeds; {_seeds(rows)}", fontsize=10)
    return figure


def best_figure(rows: Sequence[Row]) -> Figure:
    """The best β of each method over steps, with both standard errors (Fig. 6)."""
    figure, panels = _panels(1, 1)
    axes = panels[0][0]
    for method in _methods(rows):
        own = [row for row in rows if row["method"] == method]
        steps, mean = (np.array([row[key] for row in own]) for key in ("step", "reward"))
        look = _look(method, rows)
        axes.plot(steps, mean, label=f"{label(method)}, β = {own[0]['beta']:g}", **look)
        for name, alpha in (("prompts", 0.12), ("seeds", 0.25)):
            error = np.array([row[f"reward_se_{name}"] for row in own])
            axes.fill_between(
                steps, mean - error, mean + error, color=look["color"], alpha=alpha, lw=0
            )
    axes.set(xlabel="training step", ylabel="reward of generations")
    axes.legend()
    axes.set_title(
        f"± standard error: pale over prompts, dark over seeds; {_seeds(rows)}", fontsize=9
    )
    return figure


def frontier_figure(over_steps: Sequence[Row], by_beta: Sequence[Row], *, beta: float) -> Figure:
    """Reward against KL over β and steps, and J at one β for all over the β of training (ours)."""
    figure, panels = _panels(1, 2)
    left, right = panels[0]
    x = "beta_in_sd" if _in_sd(by_beta) else "beta"
    for i, method in enumerate(_methods(by_beta)):
        look = _look(method, by_beta)
        own = [row for row in by_beta if row["method"] == method]
        for row in own:
            way = [r for r in over_steps if (r["method"], r["beta"]) == (method, row["beta"])]
            left.plot(
                root([r["kl"] for r in way]), [r["reward_above_start"] for r in way],
                color=look["color"], lw=0.8, alpha=0.35,
            )  # fmt: skip
        kl, reward = (np.array([row[key] for row in own]) for key in ("kl", "reward"))
        left.errorbar(
            root(kl), reward, yerr=errors(own, "reward"), capsize=2, label=label(method), **look
        )
        for row in (own[0], own[-1]):
            left.annotate(
                f"{row['beta']:g}", (root([row["kl"]])[0], row["reward"]), fontsize=8,
                color=look["color"], xytext=(5, 4 - 9 * i), textcoords="offset points",
            )  # fmt: skip
        right.errorbar(
            [row[x] for row in own], [row["objective"] for row in own],
            yerr=errors(own, "objective"), capsize=3, label=label(method), **look,
        )  # fmt: skip
    _draw_levels(left, beta)
    left.set(
        xlabel="KL to π_ref (nats, on a square-root scale)",
        ylabel="reward above π_ref",
        title="markers: after training, by β (its ends are named);\n"
        f"lines: on the way; dashed: equal J = E[R] − {beta:g}·KL",
    )
    log_scale(right)
    right.set(
        xlabel="β of training" + " / s.d. of ΔR" * _in_sd(by_beta),
        ylabel=f"J = E[R] − {beta:g}·KL above π_ref",
        title=f"J at one β for all\n{_seeds(by_beta)}",
    )
    if linear := linear_above_collapse([row["objective"] for row in by_beta]):
        right.set_yscale("symlog", linthresh=linear)
    right.axhline(0, color="#888888", lw=0.8)
    for axes in (left, right):
        axes.title.set_fontsize(9)
        axes.legend(fontsize=8)
    return figure


def held_out_figure(rows: Sequence[Row], best: Mapping[str, float]) -> Figure:
    """Reward of generations, and below it the held-out loss, of the least β of each method and of
    its `best`, where it has one: does the loss see that the reward drops? (ours; the paper says
    that it does not)
    """
    methods = _methods(rows)
    figure, panels = _panels(2, len(methods), sharex=True)
    for column, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method]
        least = min(row["beta"] for row in own)
        chosen = [row for row in own if row["beta"] in (least, best.get(method))]
        _draw_betas(panels[0][column], chosen, "reward")
        _draw_betas(panels[1][column], chosen, "held_out_loss")
        panels[0][column].set_title(label(method))
        panels[0][column].legend(title="β", fontsize=8, title_fontsize=8)
        panels[1][column].set_xlabel("training step")
    panels[0][0].set_ylabel("reward of generations")
    panels[1][0].set_ylabel("held-out loss above step 0")
    figure.suptitle(f"the least β, and the best; {_seeds(rows)}", fontsize=10)
    return figure


def named_figure(rows: Sequence[Row]) -> Figure:
    """Each reward against KL along training, a curve a β: is what was trained on still what was
    meant? (ours) The first row is the sum that is trained on, where it is none of them.
    """
    methods, named = _methods(rows), [name for name in rows[0] if name.startswith(NAMED)]
    total = [row["reward_above_start"] for row in rows]
    is_one = any(np.allclose([row[name] for row in rows], total) for name in named)
    shown = named if is_one else ["reward_above_start", *named]
    figure, panels = _panels(len(shown), len(methods), sharex="col", sharey="row")
    for line, name in zip(panels, shown, strict=True):
        for axes, method in zip(line, methods, strict=True):
            own = [row for row in rows if row["method"] == method]
            betas = sorted({row["beta"] for row in own})
            for beta, colour in zip(betas, _shades(betas), strict=True):
                way = [row for row in own if row["beta"] == beta]
                x, y = root([row["kl"] for row in way]), [row[name] for row in way]
                axes.plot(x, y, color=colour, marker="o", ms=3, lw=1.2, label=f"{beta:g}")
            axes.axhline(0, color="#888888", lw=0.8)
        what = name.removeprefix(NAMED).removesuffix("_above_start")
        line[0].set_ylabel(f"{what} above step 0")
    for axes, method in zip(panels[0], methods, strict=True):
        axes.set_title(label(method))
        axes.legend(title="β", fontsize=8, title_fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("√KL to π_ref (√nats)")
    figure.suptitle(f"held-out prompts, {_seeds(rows)}", fontsize=10)
    return figure


def residual_figure(rows: Sequence[Row]) -> Figure:
    """How far CoPG is from π* in ΔR = βΔ, over steps: on held-out pairs, and on its own samples
    (ours), as shares of that at step 0. Where the first falls and the second rises, the policy
    leaves the data.
    """
    names = {
        "residual_held_out": "held-out pairs (best and worst of a prompt)",
        "residual_samples": "its own samples",
    }
    figure, panels = _panels(1, 2, sharey=True)
    own = [row for row in rows if row["method"] == "copg"]
    betas = sorted({row["beta"] for row in own})
    for axes, (name, title) in zip(panels[0], names.items(), strict=True):
        for beta, colour in zip(betas, _shades(betas), strict=True):
            way = [row for row in own if row["beta"] == beta]
            axes.plot([row["step"] for row in way], [row[name] for row in way],
                      color=colour, marker="o", ms=3, lw=1.2, label=f"{beta:g}")  # fmt: skip
        axes.set(title=title, xlabel="training step", yscale="log")
        axes.axhline(1, color="#888888", lw=0.8)
    panels[0][0].set_ylabel("E[(ΔR − βΔ)²], as a share of that of π_ref")
    panels[0][0].legend(title="CoPG, β", fontsize=8, title_fontsize=8)
    figure.suptitle(f"1 at π_ref, 0 at π*; {_seeds(rows)}", fontsize=10)
    return figure


def write_picture(figure: Figure, path: Any) -> None:
    """Writes a PNG and forgets the picture."""
    with path.open("wb") as stream:
        figure.savefig(stream, dpi=130, format="png")
    plt.close(figure)


def _panels(rows: int, columns: int, **shared: Any) -> tuple[Figure, Any]:
    size = (max(4.0 * columns, 6.4), 3.6 * rows + 0.6)
    figure, panels = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, **shared
    )
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _draw_betas(axes: Any, rows: Sequence[Row], name: str) -> None:
    """One curve a β, dark for small ones, with its standard error over seeds (or else prompts)."""
    betas = sorted({row["beta"] for row in rows})
    for beta, colour, marker in zip(betas, _shades(betas), _MARKERS * len(betas), strict=False):
        own = [row for row in rows if row["beta"] == beta]
        steps, mean = (np.array([row[key] for row in own]) for key in ("step", name))
        axes.plot(steps, mean, color=colour, marker=marker, ms=3.5, lw=1.4, label=f"{beta:g}")
        error = np.array([row[f"{name}_se_seeds"] for row in own])
        if np.isnan(error).all() and name == "reward":
            error = np.array([row["reward_se_prompts"] for row in own])
        axes.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.15, lw=0)


def _in_sd(rows: Sequence[Row]) -> bool:
    """Whether the s.d. of ΔR is known, in units of which β compares."""
    return not any(math.isnan(row["beta_in_sd"]) for row in rows)


def _shades(betas: Sequence[float]) -> Any:
    """Colours of β, dark for small ones."""
    return plt.get_cmap("viridis")(np.linspace(0, 0.88, max(len(betas), 2)))[: len(betas)]


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _look(method: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Colour and marker of a method, a user's own included."""
    methods = _methods(rows)
    others = [one for one in methods if one not in COLOURS]
    colour = COLOURS.get(method) or _OTHERS[others.index(method) % len(_OTHERS)]
    return {"color": colour, "marker": _MARKERS[methods.index(method) % len(_MARKERS)], "ms": 5}


def errors(rows: Sequence[Row], name: str) -> list[float]:
    """Standard errors over prompts and seeds; 0 where neither is known."""
    return [float(np.nan_to_num(total_stderr(row, name))) for row in rows]


def _seeds(rows: Sequence[Row]) -> str:
    counts = sorted({row["num_seeds"] for row in rows})
    text = "–".join(map(str, [counts[0], counts[-1]][: len(counts)]))
    return f"{text} seed{'s' * (counts[-1] > 1)}"


def root(kl: Sequence[float] | np.ndarray) -> np.ndarray:
    """√KL; an estimate may be below 0."""
    return np.sign(kl) * np.sqrt(np.abs(kl))


def linear_above_collapse(values: Sequence[float]) -> float | None:
    """For values of which the least is so low that it would hide the others: up to where an axis
    should be linear, and logarithmic below. None where it may be linear throughout.
    """
    high, low = max(map(rank, values)), min(v for v in (*values, 0.0) if math.isfinite(v))
    return _power_of_ten_above(high) if low < -4 * abs(high) else None


def _power_of_ten_above(value: float) -> float:
    """The least power of ten that is not below |value|; 1 for what is not finite, or 0."""
    is_known = math.isfinite(value) and value != 0
    return 10.0 ** max(math.ceil(math.log10(abs(value))), -3) if is_known else 1.0


def log_scale(axes: Any) -> None:
    """A logarithmic axis across what is drawn; a short one has 1, 2 and 5 of each decade."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_levels(axes: Any, beta: float) -> None:
    """Lines of equal reward − β·KL, over axes in √KL whose limits stay as they are."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    root = np.linspace(max(left, 0.0), right, 60)
    for level in np.linspace(low - beta * right**2, high, 16):
        axes.plot(root, level + beta * root**2, color="#bbbbbb", lw=0.6, ls="--", zorder=0)
    known = [tick for tick in (0, 0.1, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if tick <= right**2]
    ticks = known[:1]
    for tick in known[1:]:  # those that have room
        if np.sqrt(tick) - np.sqrt(ticks[-1]) > 0.06 * (right - left):
            ticks.append(tick)
    axes.set_xticks(np.sqrt(ticks), [f"{tick:g}" for tick in ticks])
    axes.set(xlim=(left, right), ylim=(low, high))

"""Pictures of what runs wrote."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import ArrayLike

from experiments.studies.comparison import Policy, Trained, measure
from experiments.studies.regret_figure import COLOURS, LABELS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.typing import LineStyleType, MarkerType

# One line style and marker for each β of a method, from the smallest on.
STYLES: tuple[tuple[LineStyleType, MarkerType], ...] = (
    (":", "v"),
    ("-", "o"),
    ("--", "^"),
    ("-.", "s"),
)


def reward_and_frontier(policies: Sequence[Trained], sft: Policy, *, beta: float) -> Figure:
    """Reward over training steps beside reward against KL, all above the SFT model's reward.

    Args:
        policies: of several methods, at most four β a method.
        sft: what all started from, on the prompts of their last evaluations.
        beta: β of the objective, whose level lines are drawn.
    """
    betas = {
        method: sorted({p.beta for p in policies if p.method == method})
        for method in dict.fromkeys(p.method for p in policies)
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained", sharey=True)
    # Most of what is worth seeing happens below one nat; a collapsed policy is at several.
    right.set_xscale("function", functions=(_root, _square))
    ticks = [0, 0.25, 1, 2, 4, 8, 16, 32, 64]
    right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    for policy in policies:
        style = STYLES[betas[policy.method].index(policy.beta)]
        _draw_curve(left, policy, style)
        _draw_way(right, policy, style)
    for method in betas:
        _draw_frontier(right, [p for p in policies if p.method == method], sft, beta)
    _draw_levels(right, beta)
    left.set(
        xlabel="training step",
        ylabel="reward above SFT (reward units)",
        title=f"during training: {policies[0].points[0].num_prompts} held-out prompts",
    )
    right.set(
        xlabel="KL to the SFT model (nats, on a square-root scale)",
        title=f"large: at the end, {len(sft.reward)} prompts, ± s.e.; small: on the way",
    )
    for axes in (left, right):
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.25)
    figure.legend(handles=_legend(betas, beta), loc="outside lower center", ncols=3, frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a picture and forgets it."""
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_curve(axes: Any, policy: Trained, style: tuple[LineStyleType, MarkerType]) -> None:
    steps = [point.step for point in policy.points]
    rewards = [point.reward for point in policy.points]
    line, marker = style
    look = {"linestyle": line, "marker": marker, "markersize": 4, "alpha": 0.9}
    axes.plot(steps, rewards, color=COLOURS[policy.method], **look)


def _draw_way(axes: Any, policy: Trained, style: tuple[LineStyleType, MarkerType]) -> None:
    """Evaluations of a run, without the start that all share and the end, which is drawn large."""
    points = [point for point in policy.points if point.step > 0][:-1]
    kl, rewards = [point.kl for point in points], [point.reward for point in points]
    look = {"linestyle": "", "marker": style[1], "markersize": 3, "alpha": 0.4}
    axes.plot(kl, rewards, color=COLOURS[policy.method], **look)


def _draw_frontier(axes: Any, policies: Sequence[Trained], sft: Policy, beta: float) -> None:
    """The last evaluations of one method, in the order of β, from the SFT model (β = ∞) on."""
    ordered = sorted(policies, key=lambda policy: policy.beta)
    colour = COLOURS[ordered[0].method]
    measured = [measure(trained.policy, sft, beta=beta) for trained in ordered]
    kl, reward = ([*(row[name].mean for row in measured), 0.0] for name in ("kl", "reward"))
    axes.plot(kl, reward, color=colour, linewidth=1.2)
    for (_, marker), row in zip(STYLES, measured, strict=False):
        axes.errorbar(
            row["kl"].mean,
            row["reward"].mean,
            xerr=row["kl"].stderr,
            yerr=row["reward"].stderr,
            color=colour,
            marker=marker,
            markersize=8,
            capsize=2,
        )


def _draw_levels(axes: Any, beta: float) -> None:
    """Lines of equal E[R] − β·KL, evenly over the axes, whose limits stay as they are."""
    limits = axes.get_xlim(), axes.get_ylim()
    most = limits[0][1]
    kl = _square(np.linspace(0, _root(most), 50))
    # A line is named by the KL at which its reward is 0.
    for zero in _square(np.linspace(-_root(limits[1][1] / beta), _root(most), 14)):
        axes.plot(kl, beta * (kl - zero), color="#bbbbbb", linewidth=0.6, linestyle="--", zorder=0)
    axes.set(xlim=limits[0], ylim=limits[1])


def _root(kl: ArrayLike) -> np.ndarray:
    """√KL; an estimate may be below 0."""
    return np.sign(kl) * np.sqrt(np.abs(kl))


def _square(root: ArrayLike) -> np.ndarray:
    return np.sign(root) * np.square(root)


def _legend(betas: Mapping[str, Sequence[float]], beta: float) -> list[Line2D]:
    methods = [
        Line2D([], [], color=COLOURS[method], label=f"{LABELS[method]}, β = {_listed(values)}")
        for method, values in betas.items()
    ]
    most = max(map(len, betas.values()))
    names = {1: ["β"], 2: ["small β", "large β"], 3: ["small β", "middle β", "large β"]}
    ranks = [
        Line2D([], [], color="#444444", linestyle=line, marker=marker, label=name)
        for (line, marker), name in zip(
            STYLES, names.get(most, [f"β number {i + 1}" for i in range(most)]), strict=False
        )
    ]
    level = Line2D(
        [],
        [],
        color="#bbbbbb",
        linestyle="--",
        label=f"equal E[R] − {beta:g}·KL",
    )
    return [*methods, *ranks, level]


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)

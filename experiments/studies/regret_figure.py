"""Figure 1 on given axes: regret over steps, mean and spread over seeds.

`LABELS` and `COLOURS` name the algorithms in every figure; the colours are Okabe and Ito's, safe
for colour-blind eyes. Nothing here imports matplotlib: the caller owns
figure and file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LABELS = {
    "sft": "SFT",
    "copg": "CoPG",
    "rloo": "RLOO (k = 2)",
    "pg": "PG",
    "pg_none": "PG (no baseline)",
    "pg_value": "PG (value baseline)",
    "ipo": "IPO",
    "dpo": "DPO",
}
COLOURS = {
    "copg": "#0072B2",
    "rloo": "#56B4E9",
    "pg_none": "#D55E00",
    "pg_value": "#E69F00",
    "ipo": "#009E73",
    "dpo": "#CC79A7",
}
STYLES = {
    "copg": "-",
    "rloo": (0, (1, 2)),
    "pg_none": "-.",
    "pg_value": "--",
    "ipo": (0, (5, 1, 1, 1, 1, 1)),
    "dpo": (0, (3, 1.5)),
}


def draw_regret(
    axes: Any,
    regret: np.ndarray,
    algorithms: Sequence[str],
    *,
    ends: Mapping[str, float] | None = None,
    log: bool = False,
) -> None:
    """Draws mean ± standard deviation over seeds of each algorithm.

    Args:
        axes: matplotlib axes.
        regret: reward units; [seeds, steps + 1, algorithms].
        algorithms: names, in the order of the last axis.
        ends: regret of each fixed point, marked at the right edge where it is positive.
        log: logarithmic scales.
    """
    thin = max(1, regret.shape[1] // 2000)  # more points than pixels only make the file larger
    steps = np.arange(regret.shape[1])[::thin]
    for i, name in enumerate(algorithms):
        curves = regret[:, ::thin, i]
        mean, spread = curves.mean(0), curves.std(0)
        style = {"color": COLOURS[name], "linestyle": STYLES[name]}
        over = name == "rloo"  # it coincides with CoPG: dots on top of the line show both
        axes.plot(
            steps, mean, label=LABELS[name], lw=3 if over else 1.8, zorder=4 if over else 3, **style
        )
        if not log:
            axes.fill_between(
                steps, mean - spread, mean + spread, color=COLOURS[name], alpha=0.2, lw=0
            )
        if ends and ends[name] > 1e-9:
            axes.plot(
                [1.0], [ends[name]], marker="<", ms=7, color=COLOURS[name],
                transform=axes.get_yaxis_transform(), clip_on=False, zorder=5,
            )  # fmt: skip
    axes.set_xlabel("training steps")
    axes.set_ylabel("regret  J(π*) − J(π)")
    axes.spines[["top", "right"]].set_visible(False)
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.grid(alpha=0.25, lw=0.6)

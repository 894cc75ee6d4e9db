"""Which losses are right off-policy: how far from π* each ends, exactly.

1. `ENDS`: the losses that are compared, as expected updates of groups without number;
2. `distances`: total variation to π*, `group_distances`: the same for groups of k;
3. `draw`: both on given axes, over samplers and over k.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import Array
from jax.typing import ArrayLike

from copg_jax import losses, relatives
from copg_jax.bandit import exact, population
from copg_jax.bandit.exact import Bandit
from experiments.studies.ablations import tilted_sampler

DELTA_V = -0.1
"""δV of AsymRE, as in its paper."""


def _topr(log_policy: Array, bandit: Bandit) -> Array:
    """TOPR on rewards about their mean: positive for what beats the data."""
    mean = 0.5 * ((bandit.mu1 + bandit.mu2) * bandit.reward).sum(-1)
    return population.topr(log_policy, bandit, baseline=mean)


ENDS: dict[str, population.Coefficients] = {
    "CoPG": population.GRADIENTS["copg"],
    "b = mean R (OPMD)": population.GRADIENTS["opmd"],
    "b = β ln mean exp(R/β) (OAPL)": population.GRADIENTS["oapl"],
    f"AsymRE, δV = {DELTA_V:g}".replace("-", "−"): functools.partial(
        population.asymre, delta_v=DELTA_V
    ),
    "TOPR, R − mean": _topr,
}
GROUP_LOSSES: dict[str, Callable[..., Array]] = {
    "CoPG": losses.copg_loss,
    "b = mean R (OPMD)": relatives.opmd_loss,
    "b = β ln mean exp(R/β) (OAPL)": relatives.oapl_loss,
}
COLOURS = dict(zip(ENDS, ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7"), strict=True))
MARKERS = dict(zip(ENDS, "os^Dv", strict=True))


def sampled_from(mu: ArrayLike, bandit: Bandit) -> Bandit:
    """The problem with both arms of a pair from µ."""
    return exact.make_bandit(bandit.reward, mu1=mu, mu2=mu, ref=bandit.ref, beta=float(bandit.beta))


def distance(coefficients: population.Coefficients, bandit: Bandit) -> float:
    """Total variation between the end of an algorithm, from π_ref, and π*."""
    end = population.end_of(coefficients, bandit)
    return float(exact.total_variation(end, exact.optimal_policy(bandit)))


def distances(bandit: Bandit) -> dict[str, float]:
    """`distance` of each of `ENDS`."""
    return {name: distance(coefficients, bandit) for name, coefficients in ENDS.items()}


def group_distances(name: str, bandits: Sequence[Bandit], k: int) -> list[float]:
    """`distance` of one of `GROUP_LOSSES` on groups of k, in each of these problems."""
    coefficients = functools.partial(population.group_coefficients, GROUP_LOSSES[name], k=k)
    return [distance(coefficients, bandit) for bandit in bandits]


def draw(
    axes: Sequence[Any],
    bandit: Bandit,
    *,
    tilts: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
    sizes: Sequence[int] = (2, 3, 5, 8),
) -> None:
    """Draws the distance to π* over samplers (left) and over the size of groups (right).

    Args:
        axes: two matplotlib axes.
        bandit: the problem, without contexts; its μ1 is the other sampler of the right side.
        tilts: samplers of the left side, see `tilted_sampler`.
        sizes: k of the right side.
    """
    left, right = axes
    curves = [distances(tilted_sampler(bandit, tilt)) for tilt in tilts]
    for name in ENDS:
        style = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 4}
        left.plot(tilts, [curve[name] for curve in curves], label=name, **style)
    samplers = [sampled_from(mu, bandit) for mu in (bandit.ref, bandit.mu1)]
    for name in GROUP_LOSSES:
        style = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 4}
        by_size = np.array([group_distances(name, samplers, k) for k in sizes])
        right.plot(sizes, by_size[:, 0], "-", **style)
        right.plot(sizes, by_size[:, 1], "--", **style)
    other = ", ".join(f"{probability:g}" for probability in bandit.mu1.tolist())
    left.set(
        xlabel="t of the sampler µ ∝ π*^(1 − t): π* at 0, uniform at 1",
        ylabel="total variation to π*",
        ylim=(-0.02, 0.55),  # room for the legend
    )
    left.set_title("large groups, from ever worse data", fontsize=10)
    left.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
    right.set(xlabel="completions of a group, k")
    right.set_title(f"small groups: — µ = π_ref, - - µ = ({other})", fontsize=10)

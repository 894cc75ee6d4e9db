"""One reward of several, for rewards that are computed and for those that are stored.

With weights w_i and rewards R_i of a completion, the reward that is trained on is

- `sum`: Σ_i w_i R_i;
- `min`: min_i w_i R_i over the weights that are not 0;
- `standardized_sum`: Σ_i w_i (R_i − m_i) / s_i, with mean m_i and standard deviation s_i over the
  whole data set. Statistics of each group instead would change what is optimal: 1/s_i would then
  depend on the prompt, and with it β.

One rule says which completions have none: those that lack an R_i whose weight is not 0.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from copg_jax.config.schema import FLOAT32_MAX
from copg_jax.errors import InputError


class Moments(NamedTuple):
    """Of the values of one reward over a data set, reward units."""

    mean: float
    std: float


def that_decide(weights: Mapping[str, float]) -> list[str]:
    """The rewards whose weight is not 0, in an order that does not depend on that of the names."""
    return sorted(name for name, weight in weights.items() if weight)


def combine(
    by_name: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    how: str = "sum",
    moments: Mapping[str, Moments] | None = None,
) -> np.ndarray:
    """The one reward of each completion; see the module's docstring for the equations.

    Args:
        by_name: values of each reward, NaN where it has none; [N]. They count as the float32 that
            are stored, so that stored ones combine to the same number.
        weights: of each reward; one at least is not 0.
        how: `sum`, `min` or `standardized_sum`.
        moments: of each reward, for `standardized_sum`.

    Returns:
        float64 [N]; NaN where a reward is absent whose weight is not 0.
    """
    terms = []
    for name in that_decide(weights):
        values = np.asarray(by_name[name], np.float32).astype(np.float64)
        if how == "standardized_sum":
            assert moments is not None
            values = (values - moments[name].mean) / moments[name].std
        terms.append(weights[name] * values)
    return np.min(terms, axis=0) if how == "min" else np.sum(terms, axis=0)


def require_float32(total: np.ndarray, where: Iterable[str]) -> None:
    """Raises InputError for a combined reward that float32 cannot hold.

    Args:
        total: from `combine`; [N].
        where: the place of each completion, for the message; [N].
    """
    for place, value in zip(where, total.tolist(), strict=True):
        if abs(value) > FLOAT32_MAX:
            raise InputError(
                f"{place}: the combined reward is {value:.4g}: wanted a finite number of float32. "
                "Fix: smaller weights, or rewards of another unit."
            )

"""The axes of a grid: settings that vary, with their values.

A setting of no stage is one of the trainer, the stage that makes a policy; `named` gives each its
short name, so that β and the seed have one name each. `expand` gives every combination of values, a
`Values`.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from copg_jax.config.settings import SHARED
from copg_jax.config.stages import STAGES
from copg_jax.errors import InputError

Values = dict[str, Any]
"""One value for each axis of the grid."""

BETA, SEED = "loss.beta", "seed"
LOSSES = ("loss.name", "shared.loss")  # axes whose values need no name beside them
_MOST_POINTS = 10_000


def named(grid: Mapping[str, Any], trainer: str) -> dict[str, Any]:
    """The axes by their names: those of the trainer without its own.

    Raises:
        InputError: one setting twice.
    """
    found: dict[str, Any] = {}
    for axis, given in grid.items():
        name = axis.removeprefix(f"{trainer}.")
        if name in found:
            raise InputError(
                f"grid: wanted a setting once, got {name} and {trainer}.{name}: one thing"
            )
        found[name] = given
    return found


def expand(grid: Mapping[str, Any]) -> list[Values]:
    """Every combination of the values of a grid, the last axis moving fastest.

    Raises:
        InputError: an axis without values, with a value twice, or by a value that no earlier axis
            has.
    """
    found: list[Values] = [{}]
    for axis, given in grid.items():
        if isinstance(given, Mapping):
            found = [{**v, axis: one} for v in found for one in _values(axis, _own(axis, given, v))]
        else:
            found = [{**v, axis: one} for v in found for one in _values(axis, given)]
        if len(found) > _MOST_POINTS:
            raise InputError(f"grid: wanted at most {_MOST_POINTS} points, got more by {axis}")
    return found


def _own(axis: str, given: Mapping[Any, Any], values: Values) -> Any:
    """The values of an axis that depend on an earlier one's value."""
    keys = {str(key): value for key, value in given.items()}
    hits = [str(value) for value in values.values() if str(value) in keys]
    if len(hits) != 1:
        raise InputError(
            f"grid: {axis}: wanted values for one value of an earlier setting, got some for "
            f"{', '.join(keys)} where the earlier settings are "
            f"{', '.join(f'{k}={v}' for k, v in values.items()) or 'none'}"
        )
    return keys[hits[0]]


def _values(axis: str, given: Any) -> list[Any]:
    values = given if isinstance(given, list) else [given]
    texts = [json.dumps(value) for value in values]
    if not values or len(set(texts)) < len(texts):
        raise InputError(f"grid: {axis}: wanted different values, got {', '.join(texts) or 'none'}")
    return values


def stage_of(axis: str, trainer: str) -> str:
    """Whose setting it is; SHARED for one that all may read."""
    top = axis.partition(".")[0]
    return top if top in STAGES or top == SHARED else trainer


def argument(axis: str, value: Any, trainer: str) -> str:
    """The setting as an argument of a command."""
    top = axis.partition(".")[0]
    name = axis if top in STAGES or top == SHARED else f"{trainer}.{axis}"
    return f"{name}={_as_text(value)}"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def part(axis: str, value: Any, stage: str, trainer: str) -> str:
    """What the name of a run of a stage says of a setting, e.g. `beta_0.3`."""
    text = f"{value:g}" if isinstance(value, float) else _as_text(value)
    text = re.sub(r"[^\w.+-]+", "_", text).strip("_")[:40]
    if axis in LOSSES:
        return text.rpartition(".")[2]
    own = stage_of(axis, trainer)
    named = f"{axis.rpartition('.')[2]}_{text}"
    return named if own in (stage, trainer, SHARED) else f"{own}.{named}"

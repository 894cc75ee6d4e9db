"""The matrix products that a traced program really computes, however often its loops run."""

import math
from typing import Any

from jax.interpreters import partial_eval


def matmul_flops(
    jaxpr: Any, *, loop_trips: int = 1, scan_trips: int | None = None, kernels: bool = True
) -> float:
    """Operations of all matrix products of a traced program, the bodies of loops as often as run.

    Products that no result needs are left out, as by every compiler: a hand-written gradient of a
    product has that of both factors, and one of a frozen matrix is not asked for.

    Args:
        jaxpr: `jax.jit(function).trace(...).jaxpr`.
        loop_trips: rounds of a `while` loop, which the data decide.
        scan_trips: rounds of a `scan`; None = as many as it has.
        kernels: whether to look into Pallas kernels, as no compiler does.
    """
    used = [True] * len(jaxpr.jaxpr.outvars)
    needed, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, used)
    return _flops(needed, loop_trips, scan_trips, kernels)


def _flops(jaxpr: Any, loop_trips: int, scan_trips: int | None, kernels: bool) -> float:
    """`matmul_flops` of a program or one inside it, whatever of it is needed."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            sizes = [eqn.invars[0].aval.shape[axis] for axis in contracted]
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(sizes)
        if name == "pallas_call" and not kernels:
            continue
        rounds = _rounds(eqn, loop_trips, scan_trips)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns"):
                    total += rounds * _flops(inner, loop_trips, scan_trips, kernels)
    return total


def _rounds(eqn: Any, loop_trips: int, scan_trips: int | None) -> int:
    """How often the programs inside an operation run."""
    match eqn.primitive.name:
        case "scan":
            return eqn.params["length"] if scan_trips is None else scan_trips
        case "while":
            return loop_trips
        case "shard_map":  # its body is the program of one device
            return eqn.params["mesh"].size
        case "pallas_call":  # its body is the program of one block
            return math.prod(eqn.params["grid_mapping"].grid)
    return 1

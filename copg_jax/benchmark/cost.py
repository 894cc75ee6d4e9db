"""What a compiled program costs, without running it.

1. `compile_cost` compiles and reads the compiler's own count of operations and temporary memory.
2. That count has the body of every loop once, so the matrix products of its other rounds are added.
"""

import math
import time
from typing import Any, NamedTuple

import jax
from jax.extend import core


class Cost(NamedTuple):
    """Cost of one call."""

    flops: float  # all devices together; products inside custom kernels are not seen
    temp_bytes: int  # one device: what is neither input nor output
    compile_sec: float  # tracing included


def compile_cost(function: Any, *args: Any) -> Cost:
    """Compiles `function` for `args`; a later call with such arguments does not compile again.

    Args:
        function: what `jax.jit` returns.
        args: arrays, or `jax.ShapeDtypeStruct`s where nothing shall be allocated.
    """
    start = time.perf_counter()
    traced = function.trace(*args)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    devices = {d for s in jax.tree.leaves(compiled.output_shardings) for d in s.device_set}
    counted = compiled.cost_analysis().get("flops", 0.0) * len(devices)
    left_out = _matmul_flops(traced.jaxpr.jaxpr) - _matmul_flops(traced.jaxpr.jaxpr, loops=False)
    return Cost(counted + left_out, compiled.memory_analysis().temp_size_in_bytes, seconds)


def peak_device_bytes() -> int | None:
    """Most memory that this process ever had in use on its first device; None on CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def _matmul_flops(jaxpr: core.Jaxpr, *, loops: bool = True) -> float:
    """Operations of all matrix products.

    Args:
        jaxpr: the program.
        loops: whether the body of a `scan` counts as often as it runs, or once.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left: Any = eqn.invars[0].aval
            product: Any = eqn.outvars[0].aval
            terms = math.prod(left.shape[axis] for axis in contracted)
            total += 2.0 * math.prod(product.shape) * terms
        if eqn.primitive.name == "pallas_call":
            continue
        rounds = eqn.params["length"] if loops and eqn.primitive.name == "scan" else 1
        for value in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                inner = getattr(value, "jaxpr", value)
                total += rounds * _matmul_flops(inner, loops=loops)
    return total


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)

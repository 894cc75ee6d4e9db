"""What a compiled program costs, without running it.

1. `compile_cost` compiles and reads the compiler's own count of operations and temporary memory.
2. That count has the body of every loop once, so the matrix products of its other rounds are added.

Custom kernels (splash, cuDNN) are left out altogether: the compiler does not see into them.
"""

import time
from typing import Any, NamedTuple

import jax

from experiments.matmuls import matmul_flops


class Cost(NamedTuple):
    """Cost of one call."""

    flops: float  # all devices together, without those of custom kernels
    temp_bytes: int  # one device: what is neither input nor output
    compile_sec: float  # tracing included


def compile_cost(function: Any, *args: Any, **kwargs: Any) -> Cost:
    """Compiles `function` for `args`; a later call with such arguments does not compile again.

    Args:
        function: what `jax.jit` returns.
        args: arrays, or `jax.ShapeDtypeStruct`s where nothing shall be allocated.
        kwargs: the same, by keyword.
    """
    start = time.perf_counter()
    traced = function.trace(*args, **kwargs)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    devices = {d for s in jax.tree.leaves(compiled.output_shardings) for d in s.device_set}
    counted = compiled.cost_analysis().get("flops", 0.0) * len(devices)
    once, often = (matmul_flops(traced.jaxpr, scan_trips=n, kernels=False) for n in (1, None))
    left_out = often - once
    return Cost(counted + left_out, compiled.memory_analysis().temp_size_in_bytes, seconds)


def peak_device_bytes() -> int | None:
    """Most memory that this process ever had in use on its first device; None on CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")

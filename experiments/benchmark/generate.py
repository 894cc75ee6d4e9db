"""Times greedy generation: the sampler that evaluation uses, with an EOS that never comes.

1. The first prompts of the workload form one batch.
2. The sampler makes exactly as many tokens as asked; the same sampler limited to one token gives
   the time of the prefill.
3. On a chip whose memory bandwidth is known, the decoding rate that reading weights and cache
   allows is given beside the measured one.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from copg_jax import distributed, sampling, sharding
from copg_jax.data.groups import TokenGroup
from copg_jax.errors import InputError
from copg_jax.flops import CHIPS, block_parameters
from copg_jax.models.layout import pack, round_up
from copg_jax.models.params import (
    Architecture,
    abstract_params,
    cast_matrices,
    init_params,
    logical_axes,
)
from experiments.benchmark.cost import peak_device_bytes
from experiments.benchmark.workload import Workload

_ROUNDS = 3


def measure(
    arch: Architecture,
    workload: Workload,
    *,
    batch_size: int,
    num_new: int,
    num_samples: int,
    mesh: jax.sharding.Mesh,
) -> dict[str, float | int | None]:
    """Generates and returns the numbers of one JSON line.

    Args:
        arch: architecture and compute dtype.
        workload: its first prompts are continued.
        batch_size: prompts, all in one batch.
        num_new: tokens of every completion, at least 2.
        num_samples: completions of a prompt.
        mesh: the device mesh.

    Raises:
        InputError: too few prompts or tokens, or a batch that cannot be cut over the mesh.
    """
    _check(workload, batch_size, num_new, num_samples, mesh)
    params = _random_params(arch, mesh)
    prompts = [workload[index] for index in range(batch_size)]
    inputs = _inputs(prompts, mesh)

    def median_sec(max_new_tokens: int) -> float:
        sample = sampling.make_sampler(
            arch,
            end_ids=(),  # none ends early
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
            temperature=0.0,
            mesh=mesh,
        )
        jax.block_until_ready(sample(params, *inputs))  # compiles
        return statistics.median(_seconds(sample, params, *inputs) for _ in range(_ROUNDS))

    prefill_sec, total_sec = median_sec(1), median_sec(num_new)
    decode_sec = total_sec - prefill_sec
    made = batch_size * num_samples
    length = np.array([len(row.prompt_tokens) for row in prompts])
    return {
        "tokens_per_s": made * num_new / total_sec,
        "seconds": total_sec,
        "prefill_s": prefill_sec,
        "decode_s": decode_sec,
        "decode_tokens_per_s": made * (num_new - 1) / decode_sec,
        "decode_bound_tokens_per_s": _bound(arch, length, num_samples, num_new, mesh),
        "peak_device_bytes": peak_device_bytes(),
    }


def _check(
    workload: Workload, batch_size: int, num_new: int, num_samples: int, mesh: jax.sharding.Mesh
) -> None:
    """Refuses numbers that cannot be run; arguments of `measure`."""
    shards = sharding.num_batch_shards(mesh)
    if num_new < 2 or num_samples < 1 or batch_size < 1 or batch_size % shards:
        raise InputError(
            f"wanted --new >= 2, --samples >= 1 and --batch a multiple of data x fsdp = {shards}, "
            f"got {num_new}, {num_samples} and {batch_size}"
        )
    if len(workload) < batch_size:
        raise InputError(
            f"--batch: wanted at most the {len(workload)} prompts of the workload, got {batch_size}"
        )


def _random_params(arch: Architecture, mesh: jax.sharding.Mesh) -> Any:
    """Random weights in the compute dtype, as a model that only generates is loaded."""
    key = jax.random.key(0)
    make = lambda: cast_matrices(arch, init_params(arch, key))
    shardings = sharding.shardings(mesh, logical_axes(arch), abstract_params(arch))
    return jax.jit(make, out_shardings=shardings)()


def _inputs(prompts: Sequence[TokenGroup], mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    """The sampler's arrays: tokens [B, P], lengths [B], the prompts' layout, keys [B]."""
    longest = max(len(row.prompt_tokens) for row in prompts)
    batches = pack(
        np.array([(len(row.prompt_tokens), 0) for row in prompts]),
        batch_size=len(prompts),
        num_bins=sharding.num_batch_shards(mesh),
        sizes=(round_up(longest, 8), 1, 1),
    )
    alone: dict[str, Any] = {"completion_tokens": (), "rewards": None, "ref_logps": None}
    groups = [replace(prompts[index], **alone) for index in batches.rows[0]]
    batch = batches.collate(groups)
    arrays = (
        batch.prompt_tokens,
        batch.prompt_length,
        batches.shape.prompt_layout(batch.prompt_length),
    )
    placed = distributed.place_whole(arrays, sharding.batch_sharding(mesh))
    return *placed, sampling.row_keys(0, 0, len(prompts))


def _seconds(function: Callable[..., Any], *args: Any) -> float:
    """Seconds of one call, until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def _bound(
    arch: Architecture,
    prompt_length: np.ndarray,
    num_samples: int,
    num_new: int,
    mesh: jax.sharding.Mesh,
) -> float | None:
    """Tokens a second that memory allows; None on a chip whose bandwidth is not known.

    A token of every completion needs all weights, in each replica of the model (`fsdp` and `tensor`
    divide them among its chips), the keys and values of the prompts once for all their samples, and
    on average half of each completion's own.

    Args:
        arch: architecture and compute dtype.
        prompt_length: tokens; [B].
        num_samples: K.
        num_new: tokens of a completion.
        mesh: the device mesh.
    """
    chip = CHIPS.get(mesh.devices.flat[0].device_kind)
    if chip is None:
        return None
    width = jax.numpy.dtype(arch.dtype).itemsize
    weights = block_parameters(arch) + arch.vocab_size * arch.hidden_size
    per_token = 2 * arch.num_hidden_layers * arch.num_key_value_heads * arch.head_dim
    made = len(prompt_length) * num_samples
    cached = per_token * (float(prompt_length.sum()) + made * num_new / 2)
    step_bytes = width * (weights * mesh.shape["data"] + cached)
    return made * chip.hbm_gb_per_sec * 1e9 * mesh.size / step_bytes

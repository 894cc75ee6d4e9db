"""Times the optimiser step of policy training, the one that a run takes.

1. State, loss, optimiser and step are built as `train.run` builds them; the weights are random, and
   with a rank those that are trained are adapters beside frozen ones.
2. Batches come from the training stream, which shuffles, packs and prefetches them.
3. After a warm-up each step is timed alone, from the transfer of its batch to its metrics; then as
   many in a row, with metrics read one step late, as the training loop does.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from copg_jax import distributed, sharding
from copg_jax.config.sections import LoraConfig, OptimConfig
from copg_jax.data.groups import GroupBatch
from copg_jax.data.stream import GroupStream
from copg_jax.errors import InputError
from copg_jax.flops import PEAK_TFLOPS, useful_flops
from copg_jax.hf.pretrained import PretrainedModel
from copg_jax.losses import copg_loss
from copg_jax.models.forward import make_seq_logp
from copg_jax.models.layout import pack_epochs
from copg_jax.models.params import (
    Architecture,
    abstract_params,
    cast_matrices,
    init_params,
    initial,
    logical_axes,
)
from copg_jax.objective import make_policy_loss
from copg_jax.train import optim
from copg_jax.train.loop import check_batch
from copg_jax.train.state import TrainState, create_state, state_shardings
from copg_jax.train.step import make_train_step
from experiments.benchmark.cost import compile_cost, peak_device_bytes
from experiments.benchmark.workload import Workload

ARGUMENTS = {"beta": np.float32(0.06), "learning_rate": np.float32(1e-6)}
"""Numbers of the step; any others cost the same."""


def measure(
    arch: Architecture,
    workload: Workload,
    *,
    batch_size: int,
    num_steps: int,
    num_warmup: int,
    mesh: jax.sharding.Mesh,
    lora_rank: int | None = None,
    num_microbatches: int = 1,
    logits_chunk: int | None = None,
    peak_tflops: float | None = None,
    profile: Path | None = None,
) -> dict[str, float | int | None]:
    """Runs CoPG steps and returns the numbers of one JSON line.

    Args:
        arch: architecture, compute dtype and rematerialisation.
        workload: groups; seen again where they are too few.
        batch_size: groups of a step, over all devices.
        num_steps: steps to time.
        num_warmup: steps before that, at least 1.
        mesh: the device mesh.
        lora_rank: of the adapters that are trained; None = all weights are.
        num_microbatches: pieces of a batch.
        logits_chunk: see `logprobs.hidden_to_logp`.
        peak_tflops: of one device, 10^12 operations a second; None = known by its kind, or no MFU.
        profile: folder for a profiler trace of the steps in a row.

    Raises:
        InputError: too few steps, a batch that cannot be cut over the mesh, or no folder to be made
            for the trace.
        RuntimeError: the loss became NaN or infinite: what was timed is no training.
    """
    if num_steps < 1 or num_warmup < 1:
        raise InputError(f"--steps and --warmup must be >= 1, got {num_steps} and {num_warmup}")
    check_batch(batch_size, num_microbatches, mesh)
    _make_folder(profile)
    num_bins = sharding.num_batch_shards(mesh) * num_microbatches
    batches = make_batches(workload, batch_size, num_bins, num_warmup + 2 * num_steps)
    traces: list[int] = []
    optimizer = _counted(make_optimizer(), traces)
    model = make_model(arch, mesh, lora_rank)
    step_fn, shardings = make_step(
        model, optimizer, num_microbatches=num_microbatches, logits_chunk=logits_chunk
    )
    arguments = ARGUMENTS | _random_frozen(model)
    runner = _Runner(step_fn, _create_state(model, optimizer, shardings), arguments, mesh)
    cost = compile_cost(step_fn, runner.state, runner.place(batches[0]), **arguments)
    first, second = num_warmup, num_warmup + num_steps
    for batch in batches[:first]:
        runner.run([batch])
    step_sec = statistics.median(runner.run([batch]) for batch in batches[first:second])
    with jax.profiler.trace(profile) if profile else contextlib.nullcontext():
        steady_sec = runner.run(batches[second:]) / num_steps
    return {
        **_rates(model, batches[first:second], step_sec, peak_tflops),
        "steady_pairs_per_s": batch_size / steady_sec,
        "compiled_flops": cost.flops,
        "temp_bytes": cost.temp_bytes,
        "compile_s": cost.compile_sec,
        "num_traces": len(traces),
        "peak_device_bytes": peak_device_bytes(),
    }


def _make_folder(profile: Path | None) -> None:
    """Raises InputError, before anything is compiled, where a trace could not be written."""
    try:
        if profile is not None:
            profile.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--profile {profile}: wanted a folder that can be written, got {error}. Fix: give "
            "another one."
        ) from error


def _rates(
    model: PretrainedModel,
    batches: Sequence[GroupBatch],
    step_sec: float,
    peak_tflops: float | None,
) -> dict[str, float | None]:
    """What steps of `step_sec` do a second, and which share of it is useful."""
    tokens = np.mean([b.prompt_length.sum() + b.completion_length.sum() for b in batches])
    computed = np.mean([b.layout.num_computed for b in batches])
    lengths = [(batch.prompt_length, batch.completion_length) for batch in batches]
    trained = model.lora_parameters
    flops = np.mean([useful_flops(model.arch, *own, lora_parameters=trained) for own in lengths])
    peak = peak_tflops or PEAK_TFLOPS.get(model.mesh.devices.flat[0].device_kind)
    return {
        "pairs_per_s": len(batches[0].reward) / step_sec,
        "step_s": step_sec,
        "useful_tokens_per_s": float(tokens) / step_sec,
        "mfu": peak and float(flops) / step_sec / (peak * 1e12 * model.mesh.size),
        "utilisation": float(tokens / computed),
        "useful_flops": float(flops),
    }


def make_batches(
    workload: Workload, batch_size: int, num_bins: int, num_batches: int
) -> list[GroupBatch]:
    """The first batches of a training stream, made ahead as its threads do.

    Args:
        workload: groups; seen again where they are too few.
        batch_size: groups of a batch.
        num_bins: pieces of a batch that are packed apart.
        num_batches: how many.
    """
    stream = GroupStream(
        workload,
        pack_epochs,
        batch_size=batch_size,
        num_epochs=-(-batch_size * num_batches // len(workload)),
        seed=0,
        num_bins=num_bins,
    )
    return [batch for _, batch in itertools.islice(stream, num_batches)]


def make_optimizer() -> optax.GradientTransformationExtraArgs:
    """The optimiser of a run with the default config."""
    return optim.make_optimizer(OptimConfig())


def make_model(
    arch: Architecture, mesh: jax.sharding.Mesh, lora_rank: int | None = None
) -> PretrainedModel:
    """What `open_model` gives a run, without a tokenizer and weights.

    Args:
        arch: architecture.
        mesh: the device mesh.
        lora_rank: of the adapters that are trained; None = all weights are.
    """
    lora = None if lora_rank is None else LoraConfig(rank=lora_rank)
    return PretrainedModel(arch, None, Path(), {}, "lm", mesh, lora=lora)


def make_step(
    model: PretrainedModel,
    optimizer: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    logits_chunk: int | None = None,
) -> tuple[Any, TrainState]:
    """The step that `experiments.train_policy` takes, and the shardings of its state.

    Args:
        model: from `make_model`.
        optimizer: from `make_optimizer`.
        num_microbatches: pieces of a batch.
        logits_chunk: see `logprobs.hidden_to_logp`.
    """
    shardings = state_shardings(model.mesh, optimizer, model.shapes, model.axes)
    seq_logp = make_seq_logp(model.arch, model.partitioner, chunk=logits_chunk)
    step_fn = make_train_step(
        make_policy_loss(seq_logp, copg_loss),
        optimizer,
        mesh=model.mesh,
        state_shardings=shardings,
        num_microbatches=num_microbatches,
    )
    return step_fn, shardings


class _Runner:
    """A state that steps move on, and the clock around them."""

    def __init__(
        self,
        step_fn: Callable[..., Any],
        state: TrainState,
        arguments: Mapping[str, Any],
        mesh: jax.sharding.Mesh,
    ) -> None:
        self.state = state
        self._arguments = arguments
        self._step_fn = step_fn
        self._placement = sharding.batch_sharding(mesh)

    def place(self, batch: GroupBatch) -> GroupBatch:
        """The batch on the devices."""
        return distributed.place(batch, self._placement)

    def run(self, batches: Sequence[GroupBatch]) -> float:
        """Seconds that steps on these take in a row, until the last metrics are on the host."""
        start = time.perf_counter()
        pending = None
        for batch in batches:
            self.state, metrics = self._step_fn(self.state, self.place(batch), **self._arguments)
            previous, pending = pending, metrics
            if previous is not None:
                jax.device_get(previous)
        values = jax.device_get(pending)
        seconds = time.perf_counter() - start
        if not values["finite"]:
            raise RuntimeError("The loss or its gradient is not finite: no training was timed.")
        return seconds


def _create_state(
    model: PretrainedModel, optimizer: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
    """Random weights, made where they lie."""
    make = partial(initial, model.specs, jax.random.key(0))
    return create_state(optimizer, jax.jit(make, out_shardings=shardings.params)(), shardings)


def _random_frozen(model: PretrainedModel) -> dict[str, Any]:
    """The step's argument `frozen`, as `load_frozen` gives it; none without adapters."""
    if model.lora is None:
        return {}
    make = lambda: cast_matrices(model.arch, init_params(model.arch, jax.random.key(1)))
    shardings = sharding.shardings(
        model.mesh, logical_axes(model.arch), abstract_params(model.arch)
    )
    scale = jax.device_put(
        np.float32(model.lora.alpha / model.lora.rank), sharding.replicated(model.mesh)
    )
    return {"frozen": jax.jit(make, out_shardings=shardings)() | {"lora_scale": scale}}


def _counted(
    optimizer: optax.GradientTransformationExtraArgs, traces: list[int]
) -> optax.GradientTransformationExtraArgs:
    """The same optimiser; `traces` grows each time that a step with it is traced."""

    def update(*args: Any, **extra: Any) -> Any:
        traces.append(len(traces))
        return optimizer.update(*args, **extra)

    return optimizer._replace(update=update)

"""Compiles a step for a topology and reads what it costs there.

1. `make_plan` compiles, and reads memory and collectives of one chip from what the compiler made.
2. `_roofline` divides operations and bytes by the published rates of the chip; the step takes at
   least the longest of the three times.
3. `remarks` says in words what the numbers mean.
"""

import importlib.util
import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from copg_jax import sharding
from copg_jax.config.stages import EvaluateConfig, TrainConfig
from copg_jax.errors import InputError
from copg_jax.flops import Chip
from copg_jax.models import kernels
from experiments.matmuls import matmul_flops
from experiments.planning import collectives
from experiments.planning.program import STAGES, Program, make_program, open_architecture
from experiments.planning.topology import Topology

_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """One JSON line. Memory, bytes and operations are those of one chip in one step; None where
    nothing is published (a CPU) or the step did not fit.
    """

    topology: str
    compiled_for: str
    stage: str
    model: str
    trained: str
    num_microbatches: int
    num_chips: int
    mesh: dict[str, int]
    hbm_gib_per_chip: float | None
    fits: bool | None
    arguments_gib: float
    temp_gib: float
    frozen_gib: float
    collectives: dict[str, dict[str, int]] | None
    useful_tflops_per_chip: float
    roofline_step_s: dict[str, float] | None
    bound_by: str | None
    compile_s: float


def make_plan(config: TrainConfig | EvaluateConfig, topology: Topology) -> tuple[Plan, list[str]]:
    """Compiles the step of a stage for a topology.

    Args:
        config: of the stage; its mesh has to lay out the topology's devices.
        topology: where it would run.

    Returns:
        The plan, and what there is to say about it.
    """
    is_training = isinstance(config, TrainConfig)
    remat = config.training.remat if is_training else "none"
    mesh = sharding.make_mesh(config.mesh, list(topology.devices))
    arch = kernels.choose(
        config.model.attention, replace(open_architecture(config.model), remat=remat), mesh
    )
    if arch.attention == "cudnn":
        _check_cudnn(topology)
    program = make_program(config, arch, mesh)
    start = time.perf_counter()
    traced = program.function.trace(*program.arguments, **program.keywords)
    compiled, peak = _compile(traced, topology)
    seconds = time.perf_counter() - start
    chip, arguments = topology.chip, _argument_bytes(program)
    found = roofline = bound_by = None
    if compiled is not None:
        found = collectives.count(
            compiled.as_text(), num_devices=mesh.size, unknown_trip_count=program.loop_trips
        )
        results = compiled.memory_analysis().output_size_in_bytes
        roofline = chip and _roofline(
            chip,
            flops=matmul_flops(traced.jaxpr, loop_trips=program.loop_trips) / mesh.size,
            hbm_bytes=arguments + results + program.hbm_bytes,
            message_sec=sum(one.bytes for one in found.values()) / topology.bytes_per_sec,
        )
    if roofline is not None:
        bound_by = max(roofline, key=lambda term: roofline[term])
    plan = Plan(
        topology=topology.name,
        compiled_for=topology.stand_in or topology.devices[0].device_kind,
        stage=next(stage for stage, cls in STAGES.items() if isinstance(config, cls)),
        model=Path(config.model.path).name,
        trained=_trained(config) if is_training else "-",
        num_microbatches=config.training.num_microbatches if is_training else 1,
        num_chips=mesh.size,
        mesh=dict(mesh.shape),
        hbm_gib_per_chip=chip and chip.hbm_gib,
        fits=chip and compiled is not None and peak + program.frozen_bytes <= chip.hbm_gib * _GIB,
        arguments_gib=round(arguments / _GIB, 2),
        temp_gib=round((peak - arguments) / _GIB, 2),
        frozen_gib=round(program.frozen_bytes / _GIB, 2),
        collectives=None if found is None else {k: one._asdict() for k, one in found.items()},
        useful_tflops_per_chip=round(program.useful_flops / mesh.size / 1e12, 2),
        roofline_step_s=roofline,
        bound_by=bound_by,
        compile_s=round(seconds, 1),
    )
    return plan, _remarks(plan, program, topology)


def _trained(config: TrainConfig) -> str:
    return "all weights" if config.lora is None else f"LoRA, rank {config.lora.rank}"


def _check_cudnn(topology: Topology) -> None:
    """Raises InputError where attention cannot be compiled as a GPU would compute it."""
    # JAX asks the first which version of cuDNN there is; the second is cuDNN.
    for module in ("jax_cuda13_plugin", "nvidia.cudnn"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # not even the package above it
            found = None
        if found is None:
            raise InputError(
                f"--topology {topology.name}: wanted cuDNN, whose attention a run on it takes, got "
                f"no module {module}. Fix: pip install -e '.[plan-gpu]', or model.attention=xla."
            )


def _compile(traced: Any, topology: Topology) -> tuple[Any, float]:
    """The compiled step, None where its compiler refuses it, and the most bytes one chip holds."""
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        # Only the words of the error say how much it wanted.
        wanted = re.search(r"Ran out of memory.*?(?:\(|Used )([\d.]+)G", str(error), re.DOTALL)
        if wanted is None:
            raise
        return None, float(wanted[1]) * _GIB
    memory = compiled.memory_analysis()
    if not topology.is_cpu:
        return compiled, memory.peak_memory_in_bytes
    # The CPU's compiler does not count temporaries there.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return compiled, memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def _argument_bytes(program: Program) -> int:
    """Bytes of one chip."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((program.arguments, dict(program.keywords)))
        if isinstance(leaf, jax.ShapeDtypeStruct)
    )


def _roofline(
    chip: Chip, *, flops: float, hbm_bytes: float, message_sec: float
) -> dict[str, float]:
    """Seconds that the products, the memory and the messages of one chip take at its rates."""
    terms = {
        "compute": flops / (chip.peak_tflops * 1e12),
        "hbm": hbm_bytes / (chip.hbm_gb_per_sec * 1e9),
        "interconnect": message_sec,
    }
    return {name: round(seconds, 4) for name, seconds in terms.items()}


def _remarks(plan: Plan, program: Program, topology: Topology) -> list[str]:
    """What the numbers mean, where they do not say it themselves."""
    found = []
    if topology.is_cpu:
        found.append(
            "estimate: the compiler of this CPU needs more memory than others (it does not update "
            "the state in place) and all-reduces gradients where others reduce-scatter"
        )
    elif topology.stand_in:
        found.append(f"compiled for {topology.stand_in}, with the memory of this one")
    if plan.fits is False:
        found.append(
            "does not fit: more chips, training.num_microbatches, training.remat=full or "
            "logits_chunk need less memory"
            + (", evaluation=null holds no frozen models" if plan.frozen_gib else "")
        )
    if plan.roofline_step_s and plan.bound_by == "interconnect" and program.trains:
        terms = plan.roofline_step_s
        chips = math.floor(plan.num_chips * terms["compute"] / terms["interconnect"])
        found.append(
            f"too large to keep busy: {program.num_groups} groups a step are "
            f"{program.num_tokens:,} tokens, whose products take less time than the messages of "
            f"their weights; up to about {chips} of these chips can be kept busy"
        )
    return found

#!/usr/bin/env bash
# Runs one experiment on NVIDIA GPUs: all visible ones of this node, or of every node of a SLURM job.
#
#   experiments/run_gpu.sh experiments.train_policy CONFIG.yaml ... key=value ...
#   sbatch --nodes=2 --gpus-per-node=8 --exclusive experiments/run_gpu.sh experiments.train_policy ...
#
# Without SLURM one process drives all GPUs (CUDA_VISIBLE_DEVICES chooses). In a SLURM job there is
# one process a GPU, as jax.distributed expects there; it takes addresses and ranks from SLURM. An
# experiment that is always one process, such as the benchmark, is one there too.
set -euo pipefail

flags=(
  # Off by default: collectives run beside the computation that does not need them.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # The scan over layers gathers the next layer's weights during this one, for one layer's memory.
  --xla_gpu_enable_pipelined_all_gather=true
  # Where another process dies, end instead of waiting for it: the run resumes from its checkpoint.
  --xla_gpu_nccl_terminate_on_error=true
)
export XLA_FLAGS="${flags[*]} ${XLA_FLAGS:-}" # the caller's come last and win
# A missing GPU or driver is an error, not a slow run on CPU: `runtime.check_platform` reads this.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
# JAX takes 75 % of the memory by default; CUDA and NCCL need less than 8 %. It refuses both names.
[[ ${XLA_PYTHON_CLIENT_MEM_FRACTION:-} ]] ||
  export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.92}
# One cache for all nodes, where the home folder is shared: process 0 fills it, the rest read it.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/copg_jax/xla}

die() { printf 'error: %s\n' "$*" >&2 && exit 2; }
[[ ${1:-} == experiments.* ]] || die "wanted experiments.NAME and its arguments, got '$*'"
command=(python -m "$@")
if [[ ${SLURM_JOB_ID:-} && $1 =~ \.(train_.*|sample|score|online|evaluate)$ ]]; then
  command+=(distributed=on)
  if [[ ${SLURM_STEP_NUM_TASKS:-1} == 1 ]]; then # in the batch script or salloc, not yet under srun
    gpus=${SLURM_GPUS_ON_NODE:-0} cpus=${SLURM_CPUS_ON_NODE:-0}
    ((gpus > 0 && cpus >= gpus)) || die "wanted GPUs and a CPU or more for each in this SLURM job," \
      "got $gpus GPUs and $cpus CPUs a node; ask for --gpus-per-node=N --exclusive"
    # Each process must see all GPUs of its node (it takes the one of its SLURM_LOCALID). In an
    # interactive step, which holds them already, srun would wait for ever without --overlap.
    command=(srun --ntasks="$((SLURM_JOB_NUM_NODES * gpus))" --ntasks-per-node="$gpus"
      --cpus-per-task="$((cpus / gpus))" --gpu-bind=none --overlap --kill-on-bad-exit=1
      "${command[@]}")
  fi
fi
exec "${command[@]}"

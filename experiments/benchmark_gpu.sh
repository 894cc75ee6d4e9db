#!/usr/bin/env bash
# Times training and generation on one NVIDIA GPU in less than 8 minutes, in bfloat16, by attention
# and by what the backward pass computes again. What fails (out of memory) or takes too long leaves
# the other variants alone.
#
#   experiments/benchmark_gpu.sh FOLDER                                writes results.jsonl, log.txt
#   WHEELS=DIR experiments/benchmark_gpu.sh FOLDER                     with DIR/*.whl, no network
#   SHAPES=7b experiments/benchmark_gpu.sh FOLDER                      all weights: 141 GB
#   SHAPES="tiny tiny-lora" JAX_PLATFORMS=cpu experiments/benchmark_gpu.sh FOLDER   tries it on CPU
#   PLAN=h100 experiments/benchmark_gpu.sh FOLDER                      without a GPU (plan-gpu extra)
#
# A shape that ends in -lora trains adapters of rank 16 alone. PLAN asks both planners, the GPU's and
# the CPU's compiler, for the memory of the same steps, and writes plans.txt; no time is limited.
# The most wanted variants come first: the last ones are left out when LIMIT seconds do not suffice.
set -euo pipefail
cd "$(dirname "$0")/.."
die() { printf 'error: %s\n' "$*" >&2 && exit 2; }
[[ $# == 1 ]] || die "wanted one folder for the results, got '$*'"
shapes=${SHAPES:-7b-lora 1b} limit=${LIMIT:-465} most=${MOST:-180} plan=${PLAN:-}
mkdir -p "$1" && out=$(cd "$1" && pwd)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ ${WHEELS:-} ]]; then
  python -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$WHEELS"/*.whl
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
# A cache of this run alone: compilations are timed, and what one variant tunes serves the others.
export JAX_COMPILATION_CACHE_DIR=$work/xla
[[ $plan || ${JAX_PLATFORMS:-} == cpu* ]] || python -c 'import jax; jax.devices("cuda")' 2>"$work/no_gpu" ||
  die "wanted an NVIDIA GPU that JAX sees, got none: $(tail -n 1 "$work/no_gpu")"
if [[ $plan ]]; then
  : >"$out/plans.txt"
else
  : >"$out/results.jsonl"
  : >"$out/log.txt"
  python -m experiments.benchmark workload --pairs 512 --out "$work/workload.jsonl"
fi

# variant NAME ARGUMENTS...: one JSON line, whatever happens.
variant() {
  local name=$1 left=$((limit - SECONDS)) line
  shift
  printf '\n== %s: %s (%d s left)\n' "$name" "$*" "$left" >>"$out/log.txt"
  if ((left < 20)); then
    line='"left_out": "no time"}'
  elif line=$(timeout "$((left < most ? left : most))" experiments/run_gpu.sh \
    experiments.benchmark "$@" --workload "$work/workload.jsonl" 2>>"$out/log.txt"); then
    line=${line#\{}
  else
    line="\"failed\": $?}" # 124: took too long; otherwise the log says why
  fi
  printf '{"variant": "%s", %s\n' "$name" "$line" | tee -a "$out/results.jsonl"
}

# planned SHAPE ATTENTION REMAT BATCH: the same step with the lengths of TL;DR. JAX itself knows no
# cuDNN for a CPU.
planned() {
  local model=llama2_7b lora=() pair
  [[ $1 != 1b* ]] || model=tinyllama_1b
  [[ $1 != *-lora ]] || lora=(lora.rank=16)
  for pair in "gpu $2" "cpu auto"; do
    JAX_PLATFORMS=cpu experiments/run_gpu.sh experiments.plan configs/tldr.yaml \
      configs/sizes/llama2_7b.yaml configs/losses/copg.yaml "model.path=configs/models/$model" \
      evaluation=null data.max_completion_tokens=64 "training.batch_size=$4" "training.remat=$3" \
      "${lora[@]}" "model.attention=${pair#* }" --topology "${pair% *}:1x$plan" >>"$out/plans.txt"
  done
}
training() { # SHAPE ATTENTION REMAT BATCH
  local lora=()
  [[ $1 != *-lora ]] || lora=(--lora-rank 16)
  if [[ $plan ]]; then
    planned "$@"
  else
    variant "train $1 $2 $3" train --shape "${1%-lora}" "${lora[@]}" --dtype bfloat16 \
      --attention "$2" --remat "$3" --batch "$4" --steps 4 --warmup 1
  fi
}
generation() { # SHAPE PROMPTS NEW SAMPLES; adapters are merged
  [[ $plan ]] || variant "generate $1 x$4" generate --shape "$1" --dtype bfloat16 --batch "$2" \
    --new "$3" --samples "$4"
}

# Batches that fit 141 GB: at 7b weights, Adam and gradients take 108 GB of it. With adapters all but
# what is recomputed least fits 80 GB.
for shape in $shapes; do
  case $shape in
    7b*) training "$shape" cudnn full 64 && generation 7b 128 48 1 ;;
    1b*) training "$shape" cudnn none 64 && generation 1b 128 48 1 ;;
    *) training "$shape" auto none 4 && generation "${shape%-lora}" 4 4 1 ;;
  esac
done
for shape in $shapes; do
  case $shape in
    7b*)
      training "$shape" xla full 64
      training "$shape" cudnn mlp 32
      training "$shape" cudnn dots 16
      ;;
    1b*)
      training "$shape" xla none 64
      for remat in mlp dots full; do training "$shape" cudnn "$remat" 64; done
      generation 1b 32 48 4
      ;;
    *) for remat in mlp dots full; do training "$shape" auto "$remat" 4; done ;;
  esac
done
if [[ $plan ]]; then
  python -m experiments.plan --table "$out/plans.txt"
  exit
fi
printf 'took %d s; wrote %s\n' "$SECONDS" "$out/results.jsonl"

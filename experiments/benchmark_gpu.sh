#!/usr/bin/env bash
# Times training and generation on one NVIDIA GPU in less than 8 minutes, in bfloat16, by attention
# and by what the backward pass computes again. What fails (out of memory) or takes too long leaves
# the other variants alone.
#
#   experiments/benchmark_gpu.sh FOLDER                                writes results.jsonl, log.txt
#   WHEELS=DIR experiments/benchmark_gpu.sh FOLDER                     with DIR/*.whl, no network
#   SHAPES=1b experiments/benchmark_gpu.sh FOLDER                      for a GPU of 80 GB
#   SHAPES=tiny JAX_PLATFORMS=cpu experiments/benchmark_gpu.sh FOLDER  tries the script on CPU
#
# The most wanted variants come first: the last ones are left out when LIMIT seconds do not suffice.
set -euo pipefail
cd "$(dirname "$0")/.."
die() { printf 'error: %s\n' "$*" >&2 && exit 2; }
[[ $# == 1 ]] || die "wanted one folder for the results, got '$*'"
shapes=${SHAPES:-7b 1b} limit=${LIMIT:-465} most=${MOST:-180}
mkdir -p "$1" && out=$(cd "$1" && pwd)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ ${WHEELS:-} ]]; then
  python -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$WHEELS"/*.whl
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
# A cache of this run alone: compilations are timed, and what one variant tunes serves the others.
export JAX_COMPILATION_CACHE_DIR=$work/xla
[[ ${JAX_PLATFORMS:-} == cpu* ]] || python -c 'import jax; jax.devices("cuda")' 2>"$work/no_gpu" ||
  die "wanted an NVIDIA GPU that JAX sees, got none: $(tail -n 1 "$work/no_gpu")"
: >"$out/results.jsonl"
: >"$out/log.txt"
python -m experiments.benchmark workload --pairs 512 --out "$work/workload.jsonl"

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

training() { # SHAPE ATTENTION REMAT BATCH
  variant "train $1 $2 $3" train --shape "$1" --dtype bfloat16 --attention "$2" --remat "$3" \
    --batch "$4" --steps 4 --warmup 1
}
generation() { # SHAPE PROMPTS NEW SAMPLES
  variant "generate $1 x$4" generate --shape "$1" --dtype bfloat16 --batch "$2" --new "$3" \
    --samples "$4"
}

# Batches that fit 141 GB: at 7b weights, Adam and gradients take 108 GB of it.
for shape in $shapes; do
  case $shape in
    7b) training 7b cudnn full 64 && generation 7b 128 48 1 ;;
    1b) training 1b cudnn none 64 && generation 1b 128 48 1 ;;
    *) training "$shape" auto none 4 && generation "$shape" 4 4 1 ;;
  esac
done
for shape in $shapes; do
  case $shape in
    7b) training 7b xla full 64 && training 7b cudnn mlp 32 && training 7b cudnn dots 16 ;;
    1b)
      training 1b xla none 64
      for remat in mlp dots full; do training 1b cudnn "$remat" 64; done
      generation 1b 32 48 4
      ;;
    *) for remat in mlp dots full; do training "$shape" auto "$remat" 4; done ;;
  esac
done
printf 'took %d s; wrote %s\n' "$SECONDS" "$out/results.jsonl"

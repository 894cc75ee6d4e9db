#!/usr/bin/env bash
# Runs one command on every worker of a TPU slice, and again after each pre-emption.
#
#   ./launch_tpu.sh NAME TYPE ZONE [--create] [--spot] [--project P] [--delete] -- COMMAND ...
#   ./launch_tpu.sh NAME TYPE ZONE [--project P] --delete
#
# 1. Wait for the slice. --create requests it where it is absent, failed or pre-empted; --spot takes
#    capacity that is cheaper and may be pre-empted.
# 2. Copy the tree (what git tracks or would) to all workers; end what an earlier launch left
#    running there; install, once.
# 3. Run COMMAND on all workers and show worker 0's log; every worker has its own, ~/copg_jax.log.
#    Ctrl-C lets the run save and stop.
# 4. A slice that is lost is waited for or requested again; COMMAND goes on from its checkpoint.
#    Where only the connection was lost, COMMAND is followed again, or its success is noted.
# 5. --delete removes the slice: once COMMAND has succeeded, or at once without a COMMAND.
set -euo pipefail
say() { printf '%s  %s\n' "$(date +%T)" "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2 && exit 2; }

usage='usage: ./launch_tpu.sh NAME TYPE ZONE [--create] [--spot] [--project P] [--delete] -- COMMAND'
[[ $# -ge 3 && "$1 $2 $3" != *--* ]] || die "wanted NAME TYPE ZONE first, got '$*'; $usage"
name=$1 type=$2 zone=$3 project='' create='' spot='' delete=''
shift 3
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --create) create=yes ;;
    --spot) spot=--spot ;;
    --delete) delete=yes ;;
    --project)
      [[ ${2:---} != --* ]] || die "--project: wanted a project after it, got '${2:-}'; $usage"
      project=$2 && shift ;;
    *) die "wanted the command after --, got '$1'; $usage" ;;
  esac
  shift
done
[[ $create || ! $spot ]] || die "--spot: wanted --create with it, which requests the slice; $usage"
[[ $# -gt 1 || $delete ]] || die "wanted a command after --, got none; $usage"
case $type in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  v[234]-*) runtime=tpu-ubuntu2204-base ;;
  *) die "TYPE: wanted an accelerator type such as v5litepod-16, v5p-8 or v6e-8, got '$type'" ;;
esac
command -v gcloud >/dev/null || die "wanted gcloud on PATH, got none; install the Google Cloud CLI" \
  "(https://cloud.google.com/sdk/docs/install), then run: gcloud auth login"
project=${project:-$(gcloud config get-value project 2>/dev/null || true)}
[[ $project ]] || die "wanted a project, got none; add --project P or: gcloud config set project P"

work=$(mktemp -d) last='' exists='' started='' stopped=''
undo="$(printf '%q ' "$0" "$name" "$type" "$zone" --project "$project")--delete"
finish() {
  local status=$?
  jobs -p | sed 's/^/-/' | xargs kill -- 2>/dev/null || true # the groups that follow made
  rm -rf "$work"
  [[ ! $exists ]] || say "slice $name ($type in $zone) remains and costs money; delete it:  $undo"
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

export CLOUDSDK_CORE_DISABLE_PROMPTS=1
tpus() { gcloud compute tpus "$@" --zone="$zone" --project="$project"; }
worker() { # on all of them
  tpus tpu-vm ssh "$name" --worker=all --command="bash tpu_worker.sh $(printf '%q ' "$@")" </dev/null
}
state() { # of the node, else of the request for it; ABSENT; NO_ANSWER where gcloud only complains
  local kind
  for kind in tpu-vm:state queued-resources:state.state; do
    tpus "${kind%:*}" describe "$name" --format="value(${kind#*:})" 2>"$work/error" && return
    grep -q NOT_FOUND "$work/error" || { cat "$work/error" >&2 && echo NO_ANSWER && return; }
  done
  echo ABSENT
}

remove() { # the request, with its node; the node alone where it was made without a request
  if [[ $(state) != ABSENT ]]; then
    say "slice $name: deleting" && exists=yes
    tpus queued-resources delete "$name" --force || tpus tpu-vm delete "$name" || true
  fi
  [[ $(state) == ABSENT ]] && exists='' # the exit status is the answer
}

make_ready() {
  local now requested=''
  while now=$(state) && [[ $now != READY ]]; do
    if [[ $now == "$last" ]]; then printf . >&2; else say "slice $name: $now"; fi
    [[ $now == ABSENT || $now == NO_ANSWER ]] || exists=yes
    case $now in
      NO_ANSWER) [[ $last ]] || die "slice $name: wanted its state, got no answer from gcloud" ;;
      STOPPED | HIDDEN | UNKNOWN) # for good, until somebody acts
        die "slice $name: wanted it READY in $zone, got $now; start it with: gcloud compute tpus" \
          "tpu-vm start $name --zone=$zone --project=$project" ;;
      ABSENT | FAILED | SUSPENDED | PREEMPTED | TERMINATED)
        [[ $create ]] || die "slice $name: wanted it READY in $zone, got $now; with --create it is" \
          "requested, and COMMAND goes on from its last checkpoint if it has one"
        [[ $now != FAILED || ! $requested ]] || die "slice $name: the request failed:" \
          "$(tpus queued-resources describe "$name" --format='value(state.failedData.error.message)')"
        if remove; then
          exists=yes requested=yes
          tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
            --runtime-version="$runtime" ${spot:+"$spot"} || die "slice $name: the request was refused"
        fi ;;
    esac
    last=$now
    sleep 30
  done
  exists=yes last=READY
}

follow() {
  local status job watch
  trap 'trap "exit 130" INT; stopped=yes; worker stop &
    say "the run saves and stops; Ctrl-C again leaves at once"' INT
  set -m # a process group for each, to end it with all its children
  worker follow &
  job=$!
  while sleep 30; do case $(state) in READY | NO_ANSWER) ;; *) kill -- "-$job" && exit ;; esac; done &
  watch=$!
  set +m
  while status=0 && { wait "$job" || status=$?; } && kill -0 "$job" 2>/dev/null; do :; done
  kill -- "-$watch" 2>/dev/null || true
  trap 'exit 130' INT
  return "$status"
}

attempt() {
  if [[ $started ]] && worker well >/dev/null; then follow; return; fi
  say "slice $name: copying the tree, installing where it has changed (minutes, the first time)"
  tpus tpu-vm scp "$root/experiments/tpu_worker.sh" "$work/copg_jax.tgz" "$name:" --worker=all &&
    worker install && started=yes && worker start "$@" &&
    say "slice $name: running on all workers" && follow
}

again() { # whether the slice was lost, whose state lags behind, or only the connection
  local now
  say "slice $name: the run failed; looking for a minute whether the slice was lost"
  for _ in 1 2 3 4; do
    while now=$(state) && [[ $now == NO_ANSWER ]]; do sleep 15; done # says nothing of the slice
    [[ $now == READY ]] || return 0
    sleep 15
  done
  [[ $started ]] && worker well >/dev/null # else an earlier launch's success would count
}

if [[ $# -gt 1 ]]; then
  shift # --
  root=$(dirname "$0")
  (cd "$root" && git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done |
    tar --null --files-from=- -czf "$work/copg_jax.tgz") || die "wanted a git checkout to copy from"
  while make_ready && status=0 && { attempt "$@" || status=$?; } && ((status)); do
    [[ ! $stopped ]] || exit 130
    ((status != 2)) && again || exit "$status"
    say "slice $name: lost; COMMAND goes on, from its last checkpoint where it has ended"
  done
fi
[[ ! $delete ]] || remove || die "slice $name: could not be deleted"

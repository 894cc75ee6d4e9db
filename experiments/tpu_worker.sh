#!/usr/bin/env bash
# What launch_tpu.sh runs on each worker of a slice, in its home folder, through ssh:
#
#   install         end what an earlier launch left running; replace its files in copg_jax by those
#                   of copg_jax.tgz; make .venv with the [tpu] extra, unless this setup.py already did
#   start COMMAND   start COMMAND in copg_jax
#   follow          show worker 0's log until COMMAND ends; everywhere the end of a failed one's
#   stop            ask COMMAND to save and end
#   well            whether COMMAND runs or has succeeded
#
# COMMAND is detached: a broken connection does not end it, and `follow` may be repeated, as gcloud
# does by itself. Its log is copg_jax.log, its shell copg_jax.pid, its result copg_jax.status.
# shellcheck disable=SC2329 # the last line calls them
set -euo pipefail
metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes

find_python() { # prints nothing where there is none
  local name
  for name in python3.13 python3.12 python3.11; do
    if "$name" -c 'import ensurepip, venv' 2>/dev/null; then echo "$name" && return; fi
  done
}

going() { # prints the shell of COMMAND; after a reboot its number may be another process's
  local pid
  pid=$(cat copg_jax.pid 2>/dev/null) && grep -qs copg_jax.status "/proc/$pid/cmdline" && echo "$pid"
}

well() {
  going || [[ $(cat copg_jax.status 2>/dev/null) == 0 ]] # before it ends, it writes its result
}

stop() { # SIGTERM: the run saves after its current step
  local pid
  if pid=$(going); then pkill -TERM -P "$pid" || true; fi # it may have ended meanwhile
}

end() {
  local signal pid
  for signal in TERM KILL; do
    pid=$(going) || return 0
    pkill "-$signal" -P "$pid" || true
    timeout 600 tail -f --pid="$pid" /dev/null || true
  done
}

install() {
  local key python minor
  end
  rm -f copg_jax.pid copg_jax.status # from here on, they are this launch's
  mkdir -p copg_jax && cd copg_jax
  if [[ -e ../copg_jax.files ]]; then xargs -d '\n' rm -f -- <../copg_jax.files; fi # not results
  tar --quoting-style=literal -xzvf ../copg_jax.tgz >../copg_jax.files
  key=$(cat setup.py constraints/*.txt | sha256sum)
  if [[ $(cat .venv/.installed 2>/dev/null) == "$key" ]]; then return; fi
  python=$(find_python)
  if [[ $python ]]; then
    "$python" -m venv --clear .venv
  elif ! { python3 -m pip install --quiet --user uv && # TPU images have Python 3.10; uv brings 3.12
    python3 -m uv venv --quiet --clear --seed --python 3.12 .venv; }; then
    echo "error: $HOSTNAME: wanted Python 3.11, 3.12 or 3.13 with venv and ensurepip, got" \
      "$(python3 --version 2>&1), and uv could not bring one; install it on every worker" >&2
    exit 2
  fi
  minor=$(.venv/bin/python -c 'import sys; print("py%d%d" % sys.version_info[:2])')
  .venv/bin/python -m pip install --quiet --constraint "constraints/$minor.txt" --editable '.[tpu]'
  echo "$key" >.venv/.installed
}

start() {
  cd copg_jax
  # A TPU that does not start is an error, not a slow run on CPU.
  export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}
  # shellcheck disable=SC2016 # for the inner shell to expand
  PATH=$PWD/.venv/bin:$PATH setsid \
    bash -c 'echo $$ >../copg_jax.pid; "$@"; echo $? >../copg_jax.status' - "$@" \
    </dev/null >../copg_jax.log 2>&1 &
  until [[ -s ../copg_jax.pid ]]; do sleep 0.1; done # before it, the connection could take it along
}

follow() {
  local worker log=/dev/null status
  worker=$(curl -sSf -H 'Metadata-Flavor: Google' "$metadata/agent-worker-number")
  if [[ $worker == 0 ]]; then log=copg_jax.log; fi
  tail -n +1 -f -s 0.2 --pid="$(cat copg_jax.pid)" "$log"
  status=$(cat copg_jax.status 2>/dev/null || echo 1) # none: the process was killed
  if ((status != 0 && status != 143)); then # 143: saved and ended, as SIGTERM asks for
    echo "worker $worker failed with exit status $status; its log ends:" >&2
    tail -n 20 copg_jax.log >&2
  fi
  return "$status"
}

"$@"; exit # without reading on, where the next launch has replaced this file

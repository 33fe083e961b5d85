#!/usr/bin/env bash
# Runs a command of moe_jax as several processes on this machine's CPU, to try out what a cluster
# would do.
#
#   launch/local.sh train --config=configs/quickstart.py:smoke --workdir=runs/two
#   PROCESSES=4 DEVICES=2 launch/local.sh train --config=... --config.mesh.expert=2 --workdir=...
#
# Process I writes to process_I.log in LOGS; process 0 to the terminal. SIGTERM and Ctrl-C reach all
# of them: all save the same step and end. The exit code is the first that is not 0.
# --dry_run, as the first argument, prints the commands instead of running them.
#
# Environment (default):
#   PROCESSES   (2)
#   DEVICES     (1) CPU devices of each process
#   PORT        (8476) a free port of this machine
#   LOGS        (.) directory of the logs
#   PYTHON      (python)

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ ${1:-} == --dry_run ]]; then DRY_RUN=true && shift; fi
if (($# == 0)) || [[ $1 == --help ]]; then usage && exit; fi
MODULE=$1
shift
PROCESSES=${PROCESSES:-2}
DEVICES=${DEVICES:-1}
PORT=${PORT:-8476}
LOGS=${LOGS:-.}
PYTHON=${PYTHON:-python}
[[ $PROCESSES =~ ^[2-9]$|^[1-9][0-9]+$ ]] || fail "PROCESSES is a number from 2: got $PROCESSES"

pids=()
for ((i = 0; i < PROCESSES; i++)); do
  command=(env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$DEVICES"
    "$PYTHON" -u -m "moe_jax.$MODULE" --processes="$PROCESSES" --process_id="$i"
    --coordinator="localhost:$PORT" "$@")
  if "$DRY_RUN"; then
    show "${command[@]}"
  elif ((i == 0)); then
    "${command[@]}" &
    pids+=($!)
  else
    "${command[@]}" >"$LOGS/process_$i.log" 2>&1 &
    pids+=($!)
  fi
done
if "$DRY_RUN"; then exit; fi

# A shell without job control starts its background processes with Ctrl-C ignored: pass it on as
# the signal that they do not ignore.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
status=0
for i in "${!pids[@]}"; do
  # A trapped signal ends `wait` early, with a code above 128.
  while true; do
    code=0
    wait "${pids[i]}" || code=$?
    kill -0 "${pids[i]}" 2>/dev/null || break
  done
  if ((code != 0)); then
    echo "process $i ended with exit code $code" >&2
    if ((status == 0)); then status=$code; fi
  fi
done
exit "$status"

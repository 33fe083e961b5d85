#!/usr/bin/env bash
# Trains on a Cloud TPU slice of several hosts, or on several slices: one process a host.
#
#   export NAME=moe PROJECT=my-project ZONE=us-east5-a SHARED=10.0.0.2:/share
#   launch/tpu_pod.sh create                  # a queued resource: waits for its turn
#   launch/tpu_pod.sh status                  # ACTIVE: the machines are there
#   launch/tpu_pod.sh install                 # on all hosts: the committed files, the shared disk
#   launch/tpu_pod.sh run --config=configs/quickstart.py --workdir=/mnt/shared/runs/a \
#                  --config.training.batch_size=32   # v5p-64 has 32 chips
#   launch/tpu_pod.sh logs                    # follows the output of process 0
#   launch/tpu_pod.sh logs 1 3                # ... of slice 1, host 3
#   launch/tpu_pod.sh stop                    # all save the same step; `run` goes on from it
#   launch/tpu_pod.sh delete
#
# After a host was lost, the processes on the others end within about a minute. If `status` says
# ACTIVE: install, then the same run. After a Spot preemption it says SUSPENDED, and such a request
# gets no machines again: delete, create, wait for ACTIVE, install, then the same run. On another
# number of slices or hosts the run goes on too; set one size of config.mesh to -1, or change it
# with the machine.
#
# --dry_run, before the verb, prints the commands instead of running them.
# Needs gcloud, logged in, and a project with TPU quota in the zone. All hosts write to one workdir:
# SHARED is an NFS export in their network, such as a Filestore instance.
#
# Environment (default):
#   NAME, PROJECT, ZONE   of the queued resource (required)
#   SHARED                HOST:/EXPORT, mounted at /mnt/shared (required by install)
#   ACCELERATOR_TYPE      (v5p-64) of one slice
#   RUNTIME_VERSION       (v2-alpha-tpuv5) v6e: v2-alpha-tpuv6e, v5e: v2-alpha-tpuv5-lite,
#                         v4: tpu-ubuntu2204-base
#   SLICES                (1) with more, pass --config.mesh.slices=N to run as well
#   SPOT                  (false) true: cheaper, and may be taken away at any time
#   EXTRAS                () extras to install beside tpu, such as tokenizers,chat
#   ENV                   () variables of this shell that `run` passes on in gcloud's command line,
#                         such as "WANDB_API_KEY XLA_FLAGS"

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ ${1:-} == --dry_run ]]; then DRY_RUN=true && shift; fi
VERB=${1:-help}
shift || true
if [[ $VERB == help || $VERB == --help ]]; then usage && exit; fi

need NAME PROJECT ZONE
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5p-64}
RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv5}
SLICES=${SLICES:-1}
SPOT=${SPOT:-false}
[[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail "SLICES is a number from 1: got $SLICES"
ARCHIVE=${TMPDIR:-/tmp}/moe_jax.tar.gz
WHERE=(--project="$PROJECT" --zone="$ZONE")

queued() { execute gcloud compute tpus queued-resources "$@" "${WHERE[@]}"; }
tpu_vm() { execute gcloud compute tpus tpu-vm "$@" "${WHERE[@]}"; }

# everywhere COMMAND: on all hosts of all slices at once, since what joins the processes waits for
# all of them.
everywhere() {
  local slice status=0 pids=()
  for ((slice = 0; slice < SLICES; slice++)); do
    if "$DRY_RUN"; then
      tpu_vm ssh "$NAME-$slice" --worker=all --command="$1"
    else
      tpu_vm ssh "$NAME-$slice" --worker=all --command="$1" &
      pids+=($!)
    fi
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return "$status"
}

case $VERB in
  create)
    options=(--accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION")
    if ((SLICES == 1)); then
      options+=(--node-id="$NAME-0")
    else
      options+=(--node-count="$SLICES" --node-prefix="$NAME")
    fi
    if [[ $SPOT == true ]]; then options+=(--spot); fi
    queued create "$NAME" "${options[@]}"
    ;;
  status) queued describe "$NAME" --format='value(state.state)' ;;
  install)
    need SHARED
    command=$(install_command)
    pack
    for ((slice = 0; slice < SLICES; slice++)); do
      tpu_vm scp "$ARCHIVE" "$NAME-$slice:moe_jax.tar.gz" --worker=all
    done
    printf -v mount '\nsudo apt-get install -y -q nfs-common && sudo mkdir -p /mnt/shared
mountpoint -q /mnt/shared || sudo mount -t nfs %q /mnt/shared
sudo chmod a+rwx /mnt/shared' "$SHARED"
    everywhere "$command$mount"
    ;;
  run)
    (($# > 0)) || fail "run needs the flags of moe_jax.train: run --config=... --workdir=..."
    # shellcheck disable=SC2086  # names
    need ${ENV:-}
    everywhere "$(start_command --processes=auto "$@")"
    ;;
  logs)
    tpu_vm ssh "$NAME-${1:-0}" --worker="${2:-0}" --command='tail -n 50 -F ~/train.log'
    ;;
  stop) everywhere "$STOP" ;;
  delete) queued delete "$NAME" --force --quiet ;;
  *) fail "no such verb: $VERB. One of: create status install run logs stop delete help" ;;
esac

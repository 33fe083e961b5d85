#!/usr/bin/env bash
# Trains on one Cloud TPU VM, a machine with all chips of a small slice: one process.
#
#   export NAME=moe PROJECT=my-project ZONE=us-east5-b
#   launch/tpu_vm.sh create
#   launch/tpu_vm.sh install                  # the committed files of this checkout
#   launch/tpu_vm.sh run --config=configs/quickstart.py --workdir=/home/me/runs/quickstart
#   launch/tpu_vm.sh logs                     # follows the output; Ctrl-C leaves the run alone
#   launch/tpu_vm.sh stop                     # saves a checkpoint; `run` as before goes on from it
#   launch/tpu_vm.sh fetch /home/me/runs/quickstart .   # copies a directory from the VM
#   launch/tpu_vm.sh delete                   # with its disk: fetch first
#
# `run` starts in ~/moe_jax. `install` again, for another commit, keeps all other files there, and
# results of studies. --dry_run, before the verb, prints the commands instead of running them.
# Needs gcloud, logged in, and a project with TPU quota in the zone.
#
# Environment (default):
#   NAME, PROJECT, ZONE   of the VM (required)
#   ACCELERATOR_TYPE      (v6e-8) with one host: v6e-1, -4, -8, v5litepod-1, -4, -8, v5p-8, v4-8
#   RUNTIME_VERSION       (v2-alpha-tpuv6e) v5e: v2-alpha-tpuv5-lite, v5p: v2-alpha-tpuv5,
#                         v4: tpu-ubuntu2204-base
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
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v6e-8}
RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv6e}
SPOT=${SPOT:-false}
ARCHIVE=${TMPDIR:-/tmp}/moe_jax.tar.gz
WHERE=(--project="$PROJECT" --zone="$ZONE")

tpu_vm() { execute gcloud compute tpus tpu-vm "$@" "${WHERE[@]}"; }

case $VERB in
  create)
    options=(--accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION")
    if [[ $SPOT == true ]]; then options+=(--spot); fi
    tpu_vm create "$NAME" "${options[@]}"
    ;;
  install)
    command=$(install_command)
    pack
    tpu_vm scp "$ARCHIVE" "$NAME:moe_jax.tar.gz"
    tpu_vm ssh "$NAME" --command="$command"
    ;;
  run)
    (($# > 0)) || fail "run needs the flags of moe_jax.train: run --config=... --workdir=..."
    # shellcheck disable=SC2086  # names
    need ${ENV:-}
    tpu_vm ssh "$NAME" --command="$(start_command "$@")"
    ;;
  logs) tpu_vm ssh "$NAME" --command='tail -n 50 -F ~/train.log' ;;
  stop) tpu_vm ssh "$NAME" --command="$STOP" ;;
  fetch)
    (($# == 2)) || fail "fetch needs a directory of the VM and where to put it: fetch FROM TO"
    tpu_vm scp --recurse "$NAME:$1" "$2"
    ;;
  delete) tpu_vm delete "$NAME" --quiet ;;
  *) fail "no such verb: $VERB. One of: create install run logs stop fetch delete help" ;;
esac

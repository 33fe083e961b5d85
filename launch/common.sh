# shellcheck shell=bash
# What the scripts in this folder share; read by them, not run.

DRY_RUN=false

# Prints a command such that it can be pasted, on one line.
show() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

# Runs a command, or prints it in a dry run.
execute() {
  if "$DRY_RUN"; then show "$@"; else "$@"; fi
}

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# need NAME...: refuses environment variables that are unset or empty.
need() {
  local variable
  for variable in "$@"; do
    [[ -n ${!variable:-} ]] || fail "$variable is not set. Set it: $variable=... $0 ..."
  done
}

# The comment at the head of the script.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# What a TPU host runs to install the archive that is in its home directory. What the archive has
# replaces what was there. All else in ~/moe_jax stays, such as runs, whenever this is killed. The
# runtime images have an older Python than the library needs; uv brings one along.
install_command() {
  [[ ${EXTRAS:-} =~ ^[a-z_]*(,[a-z_]+)*$ ]] ||
    fail "EXTRAS are names joined by commas, such as tokenizers,chat: got $EXTRAS"
  # shellcheck disable=SC2016  # expanded on the host
  printf '%s' 'set -e
rm -rf moe_jax.new
mkdir -p moe_jax.new moe_jax
tar -xzf moe_jax.tar.gz -C moe_jax.new
rm -rf moe_jax.new/runs
for results in moe_jax.new/experiments/*/results.jsonl; do
  test ! -e "moe_jax/${results#moe_jax.new/}" || rm "$results"
done
rm -rf moe_jax/moe_jax
mv moe_jax.new/moe_jax moe_jax/
cp -a moe_jax.new/. moe_jax/
rm -rf moe_jax.new
python3 -m pip install --user --quiet --upgrade uv
test -x venv/bin/python || python3 -m uv venv --python 3.12 venv
python3 -m uv pip install --quiet --python venv/bin/python --editable "moe_jax[tpu' \
    "${EXTRAS:+,$EXTRAS}" ']"'
}

# environment: NAME=VALUE for each variable that ENV names. A dry run shows no value: it may be a
# key.
environment() {
  local variable value
  for variable in ${ENV:-}; do
    value=${!variable}
    if "$DRY_RUN"; then value=HIDDEN; fi
    printf '%q ' "$variable=$value"
  done
}

# Packs the committed files of this checkout.
pack() {
  local root
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  execute git -C "$root" archive --format=tar.gz --output="$ARCHIVE" HEAD
}

# start_command ARGUMENT...: what a TPU host runs to train in the background.
start_command() {
  local arguments variables
  printf -v arguments '%q ' "$@"
  variables=$(environment)
  # shellcheck disable=SC2016  # expanded on the host
  printf '%s' 'cd ~/moe_jax && { test ! -e ~/train.pid || ! kill -0 $(cat ~/train.pid) 2>/dev/null' \
    ' || { echo "a run is going on: stop it first" >&2; exit 1; }; } && ' \
    "{ nohup env ${variables}~/venv/bin/python -m moe_jax.train ${arguments}" \
    '</dev/null >>~/train.log 2>&1 & echo $! >~/train.pid; }'
}

# What a TPU host runs to end the training: SIGTERM, on which it saves, and waits for it.
# shellcheck disable=SC2016,SC2034  # expanded on the host; used by the scripts
STOP='kill -TERM $(cat ~/train.pid) && while kill -0 $(cat ~/train.pid) 2>/dev/null; do sleep 1; done; tail -n 3 ~/train.log'

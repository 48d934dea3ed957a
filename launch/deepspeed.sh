#!/usr/bin/env bash
# Trains with DeepSpeed's launcher, which starts the processes of all hosts from one of them over ssh.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/deepspeed.sh [launcher's options ...] -- [key=value ...]

Trains with DeepSpeed's launcher, which starts the processes of all hosts from one of them over ssh. Options before --
go to that launcher (`deepspeed --help` lists them), keys after it to train.py (`python train.py --help`).

  one host:       launch/deepspeed.sh --num_gpus 2 -- parallel.expert=2
  several hosts:  launch/deepspeed.sh --hostfile hosts -- experiment=moepp_0.6b parallel.expert=8
                  (hosts: one line per host, such as `node01 slots=8`; the project lies at the same path on all)

SIGTERM and SIGUSR1 save and end with 75 on one host. Processes on other hosts are out of reach: send the signal to
train.py there. The launcher gives its processes 30 s to end once one of them has. There are no restarts.
TEXT
}

launcher=()
while (($#)) && [[ "$1" != -- ]]; do
    if [[ "$1" == -h || "$1" == --help ]]; then
        usage
        exit
    fi
    launcher+=("$1")
    shift
done
if (($# == 0)); then
    echo "[deepspeed.sh] error: no -- among the arguments; put the launcher's options before -- and keys after it" >&2
    exit 2
fi
shift

launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$launch/env.sh"
cd "$MOEPP_ROOT"
use_cpu_if_no_gpu "$@"

# Remote hosts see only the variables of this file.
DS_ENV_FILE="$(mktemp)"
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
for name in PATH TORCH_DISABLE_SHARE_RDZV_TCP_STORE DS_ACCELERATOR OMP_NUM_THREADS PYTORCH_ALLOC_CONF; do
    if [[ -n "${!name:-}" ]]; then
        echo "$name=${!name}" >>"$DS_ENV_FILE"
    fi
done

runner="" received=""
pass_on() {
    received="$1"
    if [[ -n "$runner" ]]; then
        kill "-$1" "$runner" 2>/dev/null || true
    fi
}
trap 'pass_on TERM' TERM
trap 'pass_on USR1' USR1
# --no_local_rank: train.py reads LOCAL_RANK from its environment and takes nothing but keys.
python "$launch/deepspeed.py" --no_local_rank "${launcher[@]}" train.py "$@" &
runner=$!
if [[ -n "$received" ]]; then # while it was started
    pass_on "$received"
fi
status=0
wait "$runner" || status=$?
while kill -0 "$runner" 2>/dev/null; do # a trapped signal ends `wait` early
    status=0
    wait "$runner" || status=$?
done
exit "$status"

#!/usr/bin/env bash
# Trains on one or several hosts with torchrun.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: [NAME=value ...] launch/torchrun.sh [key=value ...]

Trains on one or several hosts with torchrun. Keys go to train.py; `python train.py --help` lists them.

  one host:   launch/torchrun.sh experiment=moepp_0.6b parallel.expert=8
  two hosts:  NNODES=2 HEAD=node01 launch/torchrun.sh experiment=moepp_0.6b parallel.expert=8     (on each of them)

Variables:
  NPROC         processes per host (default: one per GPU; 1 without GPUs or with runtime.device=cpu)
  NNODES        hosts (default 1), or MIN:MAX
  HEAD          host where the processes meet, needed for several hosts
  PORT          port there (default 29400)
  JOB           name of the meeting, the same on each host (default: moepp)
  RESTARTS      how often torchrun starts the processes again when one fails (default 0)
  SAVE_SECONDS  time for the last save after SIGTERM or SIGUSR1, before torchrun kills (default 600)

Ends with the exit code of train.py: 0 finished, 2 wrong input, 4 training broke down, 5 a rank was lost, 75 stopped by a
signal with its state saved (start the same command to continue).
TEXT
}

launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$launch/env.sh"
for argument in "$@"; do
    case "$argument" in
    -h | --help)
        usage
        exit
        ;;
    --) fail "no -- is needed; all arguments go to train.py, and torchrun's options are variables (see --help)" ;;
    esac
done
require_number NPROC 1 1024
require_number PORT 1 65535
require_number RESTARTS 0 1000000
require_number SAVE_SECONDS 1 1000000
hosts="${NNODES:-1}"
if [[ ! "$hosts" =~ ^[1-9][0-9]{0,5}(:[1-9][0-9]{0,5})?$ ]] || ((${hosts%:*} > ${hosts#*:})); then
    fail "NNODES=$(printf %q "$hosts") is neither a number of hosts nor MIN:MAX; correct it"
fi
if [[ "$hosts" != 1 && -z "${HEAD:-}" ]]; then
    fail "NNODES=$hosts, but HEAD is not set; name the host where the processes meet"
fi
if [[ -n "${HEAD:-}" && ! "$HEAD" =~ ^[A-Za-z0-9._:-]+$ ]]; then
    fail "HEAD=$(printf %q "$HEAD") is not a host's name or address; the port goes into PORT"
fi
if [[ "${HEAD:-}" == *:* && "$HEAD" != *:*:* ]]; then # an IPv6 address has two colons or more
    fail "HEAD=$HEAD is a host with a port; the port goes into PORT"
fi
if [[ "${HEAD:-}" == .* || "${HEAD:-}" == *..* || "${HEAD:-}" =~ [^.]{64} ]]; then
    fail "HEAD=$HEAD has a part between dots that is empty or longer than 63 characters; name the host"
fi

cd "$MOEPP_ROOT"
use_cpu_if_no_gpu "$@"
gpus="$(count_devices "$@")"
nproc_per_node="${NPROC:-$((gpus > 0 ? gpus : 1))}"
share_cores "$nproc_per_node"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SAVE_SECONDS:-$TORCH_ELASTIC_SHUTDOWN_TIMEOUT}"

options=(--nproc_per_node "$nproc_per_node" --max-restarts "${RESTARTS:-0}")
if [[ "$hosts" == 1 ]]; then
    options+=(--standalone)
else
    options+=(--nnodes "$hosts" --rdzv_id "${JOB:-moepp}" --rdzv_backend c10d --rdzv_endpoint "$HEAD:${PORT:-29400}")
fi
exec python "$launch/torchrun.py" "${options[@]}" train.py "$@"

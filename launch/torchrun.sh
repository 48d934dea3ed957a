#!/usr/bin/env bash
# Trains on one or several hosts with torchrun.
#
#   one host:   launch/torchrun.sh experiment=moepp_0.6b parallel.expert=8
#   two hosts:  NNODES=2 HEAD=node01 launch/torchrun.sh experiment=moepp_0.6b parallel.expert=8     (on each of them)
#
# Variables: NPROC  processes per host (default: one per GPU, or 1)      NNODES  hosts (default 1)
#            HEAD   host where the processes meet, needed for NNODES > 1  PORT    port there (default 29400)
#            JOB    name of the meeting, the same on each host (default: moepp)
set -euo pipefail

launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$launch/env.sh"
cd "$MOEPP_ROOT"
use_cpu_if_no_gpu
gpus="$(count_gpus)"
nproc_per_node="${NPROC:-$((gpus > 0 ? gpus : 1))}"
share_cores "$nproc_per_node"

if ((${NNODES:-1} == 1)); then
    exec torchrun --standalone --nproc_per_node "$nproc_per_node" train.py "$@"
fi
if [[ -z "${HEAD:-}" ]]; then
    echo "[torchrun.sh] error: NNODES=$NNODES, but HEAD is not set; name the host where the processes meet" >&2
    exit 2
fi
exec torchrun --nnodes "$NNODES" --nproc_per_node "$nproc_per_node" --rdzv_id "${JOB:-moepp}" --rdzv_backend c10d \
    --rdzv_endpoint "$HEAD:${PORT:-29400}" train.py "$@"

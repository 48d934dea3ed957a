#!/usr/bin/env bash
# Trains with DeepSpeed's launcher, which starts the processes of all hosts from one of them over ssh.
#
#   one host:       launch/deepspeed.sh --num_gpus 2 -- parallel.expert=2
#   several hosts:  launch/deepspeed.sh --hostfile hosts -- experiment=moepp_0.6b parallel.expert=8
#                   (hosts: one line per host, such as `node01 slots=8`; the project lies at the same path on all)
#
# Options before -- go to DeepSpeed's launcher, keys after it to train.py.
set -euo pipefail

launcher=()
while (($#)) && [[ "$1" != -- ]]; do
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
use_cpu_if_no_gpu

# Remote hosts see only the variables of this file.
DS_ENV_FILE="$(mktemp)"
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
for name in PATH TORCH_DISABLE_SHARE_RDZV_TCP_STORE DS_ACCELERATOR OMP_NUM_THREADS; do
    if [[ -n "${!name:-}" ]]; then
        echo "$name=${!name}" >>"$DS_ENV_FILE"
    fi
done

# --no_local_rank: train.py reads LOCAL_RANK from its environment and takes nothing but keys.
# As a module: the script `deepspeed` does not start from a folder with blanks in its name.
python -m deepspeed.launcher.runner --no_local_rank "${launcher[@]}" train.py "$@"

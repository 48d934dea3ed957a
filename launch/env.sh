# shellcheck shell=bash
# The environment of every launched process; source it. Variables that one library alone reads are set beside its call.
# A variable that is set already is left as it is.

MOEPP_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
export MOEPP_ROOT

# The project's own environment where there is one; otherwise the active one (a container, a module, conda).
if [[ -x "$MOEPP_ROOT/.venv/bin/python" ]]; then
    export VIRTUAL_ENV="$MOEPP_ROOT/.venv" PATH="$MOEPP_ROOT/.venv/bin:$PATH"
fi

# torchrun passes on the signals at which train.py saves, and waits that long for the save before it kills.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

# Restarted workers rejoin reliably only if the rendezvous store is not shared with the process group.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

# Sizes of tensors change from step to step; segments that grow keep the GPU's memory in one piece.
if [[ -z "${PYTORCH_CUDA_ALLOC_CONF+set}${PYTORCH_HIP_ALLOC_CONF+set}" ]]; then
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
fi

# Prints how many accelerators this host offers: NVIDIA or AMD, less those that a list of visible ones hides.
count_gpus() {
    local name kfd=/sys/class/kfd/kfd/topology/nodes
    for name in CUDA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES; do
        if [[ -n "${!name+set}" ]]; then
            # CUDA itself stops at the first entry that is no device: -1, or Slurm's NoDevFiles.
            tr ',' '\n' <<<"${!name}" | sed -n '/^ *-\|^NoDev/,$d;p' | grep -c '[^[:space:]]' || true
            return
        fi
    done
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        nvidia-smi -L | grep -c '^GPU' || true
    elif command -v rocm-smi >/dev/null && [[ -e /dev/kfd ]]; then
        rocm-smi --showid --csv 2>/dev/null | grep -c '^card' || true
    elif compgen -G '/dev/nvidia[0-9]*' >/dev/null; then # a container without nvidia-smi, or a driver that does not work
        compgen -G '/dev/nvidia[0-9]*' | wc -l
    elif [[ -e /dev/kfd ]]; then # with memory of their own: a processor's graphics has cores beside it
        grep -l '^cpu_cores_count 0$' "$kfd"/*/properties 2>/dev/null | xargs -r grep -L '^simd_count 0$' | wc -l || true
    else
        echo 0
    fi
}

# count_devices KEY=VALUE ...: as count_gpus, but 0 where the keys for train.py say runtime.device=cpu.
count_devices() {
    local key device=""
    for key in "$@"; do
        [[ "$key" != runtime.device=* && "$key" != +runtime.device=* ]] || device="${key#*=}"
    done
    if [[ "${device//[\"\']/}" == cpu ]]; then echo 0; else count_gpus; fi
}

# use_cpu_if_no_gpu KEY=VALUE ...: tells DeepSpeed, which would otherwise probe for an accelerator and warn.
use_cpu_if_no_gpu() {
    if [[ "$(count_devices "$@")" == 0 ]]; then
        export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    fi
}

# share_cores PROCESSES: divides the cores of this host among that many processes.
share_cores() {
    local threads=$(($(nproc) / $1))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}"
}

# fail MESSAGE: one line, and the exit code of a mistake of the user.
fail() {
    echo "[$(basename "$0")] error: $*" >&2
    exit 2
}

# require_number NAME LEAST MOST: refuses a variable that is set, but not to a whole number in that range.
require_number() {
    local value="${!1:-}"
    [[ -z "$value" ]] || { [[ "$value" =~ ^(0|[1-9][0-9]{0,8})$ ]] && ((value >= $2 && value <= $3)); } ||
        fail "$1=$(printf %q "$value") is not a whole number from $2 to $3; correct it, or unset it for the default"
}

# hydra_text TEXT: the text as a quoted value of Hydra's command line, whatever characters it holds.
hydra_text() {
    local text
    # Backslashes count only before a quote, before the end, and before ${, which would refer to another value.
    text="$(sed -E 's/(\\+)$/\1\1/; s/(\\*)"/\1\1\\"/g; s/(\\*)\$\{/\1\1\\${/g' <<<"$1")"
    printf '"%s"' "$text"
}

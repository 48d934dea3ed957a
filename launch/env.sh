# shellcheck shell=bash
# The environment of every launched process; source it. Nothing else in the project sets variables, but moepp/cpu.py
# those that MOEPP_CPU stands for.
# A variable that is set already is left as it is.

MOEPP_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
export MOEPP_ROOT

# The project's own environment where there is one; otherwise the active one (a container, a module, conda).
if [[ -x "$MOEPP_ROOT/.venv/bin/python" ]]; then
    export VIRTUAL_ENV="$MOEPP_ROOT/.venv" PATH="$MOEPP_ROOT/.venv/bin:$PATH"
fi

# Restarted workers rejoin reliably only if the rendezvous store is not shared with the process group.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

# Prints how many accelerators this host offers: NVIDIA or AMD, less those hidden by CUDA_VISIBLE_DEVICES.
count_gpus() {
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]' || true
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        nvidia-smi -L | grep -c '^GPU' || true
    elif command -v rocm-smi >/dev/null && [[ -e /dev/kfd ]]; then
        rocm-smi --showid --csv 2>/dev/null | grep -c '^card' || true
    else
        echo 0
    fi
}

# use_cpu_if_no_gpu: tells DeepSpeed, which would otherwise probe for an accelerator and warn.
use_cpu_if_no_gpu() {
    if [[ "$(count_gpus)" == 0 ]]; then
        export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    fi
}

# share_cores PROCESSES: divides the cores of this host among that many processes.
share_cores() {
    local threads=$(($(nproc) / $1))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}"
}

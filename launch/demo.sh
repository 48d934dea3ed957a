#!/usr/bin/env bash
# Sets everything up, then pretrains a small MoE++ on real English text: 2 processes, expert parallel.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/demo.sh [--steps N] [key=value ...]

Sets up .venv, prepares the demo text in data/demo, pretrains a small MoE++ with 2 processes that share the
experts, and ends with a report. Works from any directory and any number of times; each time trains a new run.

  --steps N     optimizer steps (the same as train.steps=N)
  key=value     any configuration key, handed to train.py: optim.lr=1e-3 parallel.expert=1 run.name=mine
  -h, --help    this text
TEXT
}

die() {
    echo "[demo.sh] error: $*; see launch/demo.sh --help" >&2
    exit 2
}

name="demo-$(date +%Y%m%d-%H%M%S)"
run_dir=""
overrides=()
while (($#)); do
    case "$1" in
    -h | --help)
        usage
        exit
        ;;
    --steps | --steps=*)
        if [[ "$1" == --steps ]]; then
            (($# > 1)) || die "--steps needs a number of optimizer steps"
            shift
        fi
        steps="${1#--steps=}"
        [[ "$steps" =~ ^[1-9][0-9]*$ ]] || die "--steps $steps is not a whole number above 0"
        overrides+=("train.steps=$steps")
        ;;
    -*) die "unknown option $1" ;;
    run.name=*) name="${1#*=}" ;;
    run.dir=*) run_dir="$(realpath -m -- "${1#*=}")" ;;
    *=*) overrides+=("$1") ;;
    *) die "$1 is not of the form key=value" ;;
    esac
    shift
done

launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$launch/setup.sh"

phase="" phase_start=0
begin() {
    phase="$1" phase_start=$SECONDS
    printf '\n== %s\n' "$phase"
}
end() { printf '== %s: done in %d s\n' "$phase" $((SECONDS - phase_start)); }
trap 'status=$?; ((status == 0)) || echo "== $phase: failed after $((SECONDS - phase_start)) s" >&2' EXIT

begin "set-up"
set_up
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$launch/env.sh"
cd "$MOEPP_ROOT"
gpus="$(count_devices "${overrides[@]}")"
if ((gpus < 2)); then
    [[ "$gpus" == 0 ]] || echo "one GPU cannot serve 2 processes; training on the CPU"
    export CUDA_VISIBLE_DEVICES=""
fi
use_cpu_if_no_gpu "${overrides[@]}"
share_cores 2
# Both processes are on this host; its name need not resolve.
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
end

begin "data"
moepp prepare --demo
end

begin "training"
run_dir="${run_dir:-runs/$name}"
python "$launch/torchrun.py" --standalone --nproc_per_node 2 train.py parallel.expert=2 \
    "run.name=$(hydra_text "$name")" "run.dir=$(hydra_text "$run_dir")" "${overrides[@]}"
end

begin "report"
moepp report "$run_dir"
end

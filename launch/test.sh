#!/usr/bin/env bash
# Sets everything up, then checks and tests the project.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/test.sh [--all | --exhaustive] [pytest arguments ...]

Sets up .venv, then runs ruff (lint and format), pyright on the code, and pytest.

  --all         the slow tests too
  --exhaustive  these, every combination of layouts, and many repeats
  -h, --help    this text

Everything else goes to pytest, which runs in the project's root: launch/test.sh tests/unit -k router
TEXT
}

# Tests of one process keep one core busy, and those of several often wait: at once they take little more than half.
in_two_halves() {
    local status=0
    log="$(mktemp)" # not local: the trap outlives this function
    echo "== pytest tests/unit, at the same time; what it prints follows"
    python -m pytest "${pytest_args[@]}" -p no:cacheprovider tests/unit >"$log" 2>&1 &
    units=$!
    trap 'kill "$units" 2>/dev/null || true; rm -f "$log"' EXIT
    echo "== pytest tests/dist tests/e2e tests/gpu"
    python -m pytest "${pytest_args[@]}" tests/dist tests/e2e tests/gpu || status=$?
    wait "$units" || status=$?
    echo "== pytest tests/unit"
    cat "$log"
    return "$status"
}

pytest_args=()
has_more=false
is_whole=false
for argument in "$@"; do
    case "$argument" in
    -h | --help)
        usage
        exit
        ;;
    --all)
        pytest_args+=(-m "not exhaustive")
        is_whole=true
        ;;
    --exhaustive)
        pytest_args+=(-m "") # an empty expression selects every test
        is_whole=true
        ;;
    *)
        pytest_args+=("$argument")
        has_more=true
        ;;
    esac
done

launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$launch/setup.sh"
set_up
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$launch/env.sh"
use_cpu_if_no_gpu
# Several processes per test share the cores, so that more threads would only slow one another down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cd "$MOEPP_ROOT"

echo "== ruff"
ruff check .
ruff format --check .
echo "== pyright"
pyright
if "$is_whole" && ! "$has_more"; then
    in_two_halves
    exit
fi
echo "== pytest"
exec python -m pytest "${pytest_args[@]}"

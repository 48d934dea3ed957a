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
Where no file or folder is named, tests/unit runs first, on up to 4 cores at a time (-n 0: on one).
TEXT
}

pytest_args=()
for argument in "$@"; do
    case "$argument" in
    -h | --help)
        usage
        exit
        ;;
    --all) pytest_args+=(-m "not exhaustive") ;;
    --exhaustive) pytest_args+=(-m "") ;; # an empty expression selects every test
    *) pytest_args+=("$argument") ;;
    esac
done

launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
names_files=false
stops_early=false
for argument in "$@"; do
    case "$argument" in
    -x | --exitfirst | --maxfail*) stops_early=true ;;
    -*) ;;
    *) [[ ! -e "$launch/../${argument%%::*}" ]] || names_files=true ;;
    esac
done
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
echo "== pytest"
if "$names_files"; then
    exec python -m pytest "${pytest_args[@]}"
fi
cores="$(python -c 'import os; print(min(4, len(os.sched_getaffinity(0))))')"
first=0 second=0
python -m pytest tests/unit -n "$cores" --dist loadfile "${pytest_args[@]}" || first=$?
readonly FAILED=1 NO_TESTS=5 # pytest's exit codes
if ((first != 0 && first != NO_TESTS)) && { ((first != FAILED)) || "$stops_early"; }; then
    exit "$first"
fi
# The others start several processes each, which compete for the cores as it is.
python -m pytest --ignore=tests/unit "${pytest_args[@]}" || second=$?
if ((first == NO_TESTS)); then
    exit "$second"
elif ((second == NO_TESTS)); then
    exit "$first"
fi
exit "$((first ? first : second))"

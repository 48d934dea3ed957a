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
exec python -m pytest "${pytest_args[@]}"

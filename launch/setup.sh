#!/usr/bin/env bash
# Creates .venv at the project's root with everything that pyproject.toml names, or reuses it.
# demo.sh and test.sh source this file and call set_up; run by itself it does just that.
#
# Variables:
#   PYTHON        interpreter for a new .venv (default: the first of python3, python3.11 ... that pyproject.toml allows)
#   MOEPP_TORCH   cpu or cuda: the build of torch (default: cuda where there is an NVIDIA GPU, else cpu)
#
# Safe to run at any time: a finished environment is reused at once, a changed pyproject.toml updates it, an
# interrupted installation starts afresh, and of several runs at once one installs while the others wait.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
STAMP="$VENV/setup-stamp"           # written last: what was installed, and for which place
INCOMPLETE="$VENV/setup-incomplete" # there while an installation is under way
CPU_INDEX="https://download.pytorch.org/whl/cpu"

say() { printf '[%s] %s\n' "$(basename "$0")" "$*" >&2; }
die() {
    say "error: $*"
    exit 1
}

set_up() {
    case "${MOEPP_TORCH:-}" in
    "" | cpu | cuda) ;;
    *) die "MOEPP_TORCH=$MOEPP_TORCH is not one of cpu, cuda; choose one of them" ;;
    esac
    if ! _is_ready; then
        mkdir -p "$VENV" || die "cannot create $VENV; make the project's folder writable"
        # A subshell, so that the lock ends with it whatever happens.
        (
            flock --nonblock 9 || {
                say "another set-up of $VENV is running; waiting for it"
                flock 9
            }
            _is_ready || _install
        ) 9>>"$VENV/setup-lock"
    fi
    _remark_on_gpu
}

# The stamp: pyproject's checksum, the project's place (scripts in .venv hold absolute paths), the build of torch.
_checksum() { sha256sum <"$ROOT/pyproject.toml" | cut -d' ' -f1; }
_stamped() { [[ -f "$STAMP" ]] && sed -n "s/^$1=//p" "$STAMP"; }

_is_ready() {
    [[ -x "$VENV/bin/python" && ! -e "$INCOMPLETE" ]] &&
        [[ "$(_stamped pyproject)" == "$(_checksum)" && "$(_stamped root)" == "$ROOT" ]] &&
        [[ -z "${MOEPP_TORCH:-}" || "$(_stamped torch)" == "$MOEPP_TORCH" ]]
}

_install() {
    local start=$SECONDS
    _clear_if_stale
    if [[ ! -x "$VENV/bin/python" ]]; then
        local python
        python="$(_find_python)"
        say "creating .venv with $("$python" --version)"
        touch "$INCOMPLETE"
        "$python" -m venv "$VENV"
    fi
    _is_allowed "$VENV/bin/python" ||
        die "$VENV holds $("$VENV/bin/python" --version), and $(_allowed) is needed; remove that folder and run again"
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 ||
        die "$VENV has no pip; remove that folder and run again"
    touch "$INCOMPLETE"

    local torch
    torch="$(_stamped torch || true)"
    torch="${MOEPP_TORCH:-${torch:-$(_default_torch)}}"
    _install_torch "$torch"
    say "installing what pyproject.toml names (a few minutes the first time)"
    _pip --editable "${ROOT}[test,demo,docs]" || die "the installation failed (see above); run again to start afresh"

    printf 'pyproject=%s\nroot=%s\ntorch=%s\n' "$(_checksum)" "$ROOT" "$torch" >"$STAMP"
    rm "$INCOMPLETE"
    say "environment ready after $((SECONDS - start)) s"
}

# Empties a .venv that cannot be brought up to date in place. The lock file stays: others wait on it.
_clear_if_stale() {
    local why="" root torch
    root="$(_stamped root || true)" torch="$(_stamped torch || true)"
    if [[ -e "$INCOMPLETE" ]]; then
        why="an earlier installation did not finish"
    elif [[ -n "$root" && "$root" != "$ROOT" ]]; then
        why="it was made for $root"
    elif [[ -n "$torch" && -n "${MOEPP_TORCH:-}" && "$torch" != "$MOEPP_TORCH" ]]; then
        why="it has the $torch build of torch"
    elif [[ -e "$VENV/bin/python" || -L "$VENV/bin/python" ]] && ! "$VENV/bin/python" -c '' 2>/dev/null; then
        why="its Python no longer runs"
    fi
    if [[ -n "$why" ]]; then
        say "rebuilding .venv: $why"
        find "$VENV" -mindepth 1 -maxdepth 1 ! -name setup-lock -exec rm -rf {} +
    fi
}

# The minor versions of Python 3 that pyproject.toml allows: the first, and the first above.
_bounds() { sed -n 's/^requires-python = ">=3\.\([0-9]*\),<3\.\([0-9]*\)".*/\1 \2/p' "$ROOT/pyproject.toml"; }
_allowed() {
    local first above
    read -r first above < <(_bounds)
    echo "Python 3.$first to 3.$((above - 1))"
}
_is_allowed() {
    local first above
    read -r first above < <(_bounds)
    "$1" -c "import sys; sys.exit(not (3, $first) <= sys.version_info < (3, $above))" 2>/dev/null
}

_find_python() {
    local candidate found="" candidates=(python3) first above
    read -r first above < <(_bounds)
    for ((; first < above; first++)); do
        candidates+=("python3.$first")
    done
    if [[ -n "${PYTHON:-}" ]]; then
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        _is_allowed "$candidate" || continue
        found="$candidate"
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    [[ -n "$found" ]] || die "no $(_allowed) among: ${candidates[*]};" \
        "install one (apt-get install python3 python3-venv) or set PYTHON"
    local package
    package="$("$found" -c 'import sys; print(f"python{sys.version_info[0]}.{sys.version_info[1]}-venv")')"
    die "$found cannot create virtual environments; install its venv module: apt-get install $package"
}

_default_torch() { if [[ -e /dev/nvidiactl || -e /dev/nvidia0 ]]; then echo cuda; else echo cpu; fi; }

_pip() { "$VENV/bin/python" -m pip install -qq --no-input --disable-pip-version-check "$@"; }

# torch first and apart: PyPI's build brings gigabytes of CUDA libraries, which a machine without GPU does not need.
_install_torch() {
    local version
    version="$("$VENV/bin/python" - "$ROOT/pyproject.toml" <<'PY'
import sys, tomllib

with open(sys.argv[1], "rb") as f:
    print(tomllib.load(f)["tool"]["moepp"]["torch"])
PY
)"
    if [[ "$1" == cpu ]]; then
        say "installing torch $version, CPU build"
        local index=()
        # Asked for only where it answers: pip would otherwise retry for minutes.
        if "$VENV/bin/python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' \
            "$CPU_INDEX/torch/" >/dev/null 2>&1; then
            index=(--extra-index-url "$CPU_INDEX")
        fi
        # "+cpu" is found on that index or wherever pip's own configuration points.
        if _pip "${index[@]}" "torch==$version+cpu" 2>/dev/null; then
            return
        fi
        say "no CPU build of torch $version found; taking the default build from pip's index (may be several GB)"
    else
        say "installing torch $version, CUDA build"
    fi
    _pip "torch==$version" || die "torch $version could not be installed (see above); run again to start afresh"
}

_remark_on_gpu() {
    if [[ -z "${MOEPP_TORCH:-}" && "$(_stamped torch)" == cpu && "$(_default_torch)" == cuda ]]; then
        say "note: .venv has the CPU build of torch, but this machine has a GPU;" \
            "MOEPP_TORCH=cuda ./launch/setup.sh replaces it"
    fi
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    set_up
fi

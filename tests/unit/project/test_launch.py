"""The launch scripts: arguments refused before any work, and a set-up that survives what happens to set-ups."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepps", "3"], "unknown option --stepps"),
        (["--steps"], "--steps needs a number"),
        (["--steps", "many"], "--steps many is not a whole number above 0"),
        (["--steps=0"], "--steps 0 is not a whole number above 0"),
        (["train.steps"], "train.steps is not of the form key=value"),
    ],
)
def test_demo_refuses_a_wrong_argument_before_setting_up(arguments, message, tmp_path):
    done = subprocess.run([ROOT / "launch/demo.sh", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize("script", ["demo.sh", "test.sh"])
def test_help_prints_usage_without_setting_up(script, tmp_path):
    done = subprocess.run([ROOT / "launch" / script, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: launch/{script}") and not done.stderr


STAND_IN = """#!/usr/bin/env bash
# A Python whose environments are copies of itself and whose pip only writes down what it was asked for.
case "$*" in
*"sys.version_info <"*)
    version="$(cat "$PROJECT/version" 2>/dev/null || echo "3, 11")"
    exec "$REAL_PYTHON" -c "${2/sys.version_info/($version)}" ;;
*ensurepip*) [[ ! -e "$PROJECT/no-venv" ]] ;;
*urlopen*) exit 1 ;;
"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip install"*)
    echo "$*" >>"$PROJECT/installed"
    while [[ -e "$PROJECT/slow" ]]; do sleep 0.05; done
    [[ ! -e "$PROJECT/fail" ]]
    ;;
"-m pip"* | "-c" | "-c ") ;;
*) exec "$REAL_PYTHON" "$@" ;;
esac
"""


class Project:
    """A folder with setup.sh and pyproject.toml, and the stand-in for Python."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "launch").mkdir(parents=True)
        shutil.copy(ROOT / "launch/setup.sh", folder / "launch")
        shutil.copy(ROOT / "pyproject.toml", folder)
        python = folder / "stand-in python"
        python.write_text(STAND_IN)
        python.chmod(0o755)

    def start(self, **variables: str) -> subprocess.Popen[str]:
        environ = {**os.environ, "REAL_PYTHON": sys.executable, "PROJECT": str(self.folder), "MOEPP_TORCH": "cpu"}
        environ["PYTHON"] = str(self.folder / "stand-in python")
        return subprocess.Popen(
            ["bash", str(self.folder / "launch/setup.sh")],
            env={**environ, **variables},
            cwd="/",
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def set_up(self, **variables: str) -> tuple[int, str]:
        """Exit code and messages."""
        process = self.start(**variables)
        _, messages = process.communicate(timeout=120)
        return process.returncode, messages

    @property
    def installed(self) -> list[str]:
        log = self.folder / "installed"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path / "a project")


def test_setup_installs_once_and_reuses_the_environment(project):
    assert project.set_up()[0] == 0
    torch, everything = project.installed
    assert "torch==2.13.0+cpu" in torch
    assert everything.endswith("--editable " + str(project.folder) + "[test,demo,docs]")
    assert project.set_up() == (0, "")
    assert len(project.installed) == 2


def test_setup_takes_the_default_torch_where_no_cpu_build_is_found_and_says_so(project):
    python = project.folder / "stand-in python"
    python.write_text(STAND_IN.replace("*urlopen*)", '*"+cpu") exit 1 ;;\n*urlopen*)'))
    code, messages = project.set_up()
    assert code == 0 and "no CPU build of torch" in messages
    assert "torch==2." in project.installed[0] and "+cpu" not in project.installed[0]


def test_setup_updates_in_place_after_a_change_of_pyproject(project):
    project.set_up()
    kept = project.folder / ".venv/kept"
    kept.touch()
    with (project.folder / "pyproject.toml").open("a") as f:
        f.write("# changed\n")
    code, messages = project.set_up()
    assert code == 0 and "rebuilding" not in messages
    assert kept.exists() and len(project.installed) == 4


def test_setup_rebuilds_after_an_interrupted_installation(project):
    (project.folder / "slow").touch()
    process = project.start()
    while not project.installed:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    (project.folder / "slow").unlink()
    stale = project.folder / ".venv/stale"
    stale.touch()
    code, messages = project.set_up()
    assert code == 0 and "an earlier installation did not finish" in messages
    assert not stale.exists()
    assert project.set_up() == (0, "")


def test_setup_reports_a_failed_installation_and_recovers(project):
    (project.folder / "fail").touch()
    code, messages = project.set_up()
    assert code != 0 and "could not be installed" in messages
    (project.folder / "fail").unlink()
    assert project.set_up()[0] == 0


def test_setup_rebuilds_in_a_moved_project(project, tmp_path):
    project.set_up()
    project.folder = project.folder.rename(tmp_path / "moved")
    code, messages = project.set_up()
    assert code == 0 and "it was made for" in messages


def test_setup_rebuilds_for_another_build_of_torch(project):
    project.set_up()
    code, messages = project.set_up(MOEPP_TORCH="cuda")
    assert code == 0 and "it has the cpu build of torch" in messages
    assert "+cpu" not in project.installed[2]


def test_two_setups_at_once_install_once(project):
    (project.folder / "slow").touch()
    first = project.start()
    while not project.installed:
        time.sleep(0.02)
    second = project.start()
    assert any("waiting for it" in line for line in second.stderr)
    (project.folder / "slow").unlink()
    first.communicate(timeout=120)
    second.communicate(timeout=120)
    assert first.returncode == second.returncode == 0
    assert len(project.installed) == 2


@pytest.mark.parametrize(
    ("hindrance", "variables", "message"),
    [
        ("version=3, 10", {}, "no Python 3.11 to 3.13 among: "),
        ("version=3, 14", {}, "no Python 3.11 to 3.13 among: "),
        ("no-venv", {}, "apt-get install python3"),
        (None, {"MOEPP_TORCH": "tpu"}, "MOEPP_TORCH=tpu is not one of cpu, cuda"),
        (None, {"PYTHON": "no-such-python"}, "no Python 3.11 to 3.13 among: no-such-python"),
    ],
)
def test_setup_names_what_is_missing_and_the_remedy(project, hindrance, variables, message):
    if hindrance:
        name, _, content = hindrance.partition("=")
        (project.folder / name).write_text(content)
    code, messages = project.set_up(**variables)
    assert code != 0 and message in messages
    assert messages.count("\n") == 1
    assert not project.installed


def sourced(script: str, **variables: str) -> list[str]:
    """Words printed by a script after it sourced env.sh, with only the given variables set."""
    command = ["bash", "-c", f'set -eu; source "{ROOT}/launch/env.sh"; {script}']
    environ = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.split()


def test_environment_shares_the_cores_and_keeps_what_the_user_set():
    cores = len(os.sched_getaffinity(0))
    show = 'echo "$OMP_NUM_THREADS $TORCH_DISABLE_SHARE_RDZV_TCP_STORE"'
    assert sourced(f"share_cores 1; {show}") == [str(cores), "1"]
    assert sourced(f"share_cores {2 * cores}; {show}") == ["1", "1"]
    assert sourced(f"share_cores 1; {show}", OMP_NUM_THREADS="7", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0") == ["7", "0"]


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
@pytest.mark.parametrize("key", ["runtime.device=cpu", "+runtime.device=cpu", "runtime.device='cpu'"])
def test_processes_are_counted_by_gpus_unless_the_cpu_is_asked_for(name, key):
    two = {name: "0,1"}
    assert sourced(
        "count_devices; count_devices optim.lr=1 runtime.device=cuda run.name=runtime.device=cpu", **two
    ) == [*("2", "2")]
    assert sourced(f'count_devices runtime.device=cuda "{key}"', **two) == ["0"]
    assert sourced(f'count_devices "{key}" runtime.device=auto', **two) == ["2"]
    assert sourced(f'use_cpu_if_no_gpu "{key}"; echo "${{DS_ACCELERATOR:-}}"', **two) == ["cpu"]


def test_memory_of_gpus_grows_in_segments_unless_the_user_has_set_how():
    show = 'echo "${PYTORCH_ALLOC_CONF:-none} ${PYTORCH_CUDA_ALLOC_CONF:-none}"'
    assert sourced(show) == ["expandable_segments:True", "none"]
    assert sourced(show, PYTORCH_ALLOC_CONF="backend:native") == ["backend:native", "none"]
    assert sourced(show, PYTORCH_CUDA_ALLOC_CONF="backend:native") == ["none", "backend:native"]


@pytest.mark.parametrize(("visible", "count"), [("", "0"), ("0", "1"), ("2,3,5", "3")])
def test_environment_counts_the_visible_gpus(visible, count):
    assert sourced("count_gpus", CUDA_VISIBLE_DEVICES=visible) == [count]
    accelerator = sourced('use_cpu_if_no_gpu; echo "${DS_ACCELERATOR:-}"', CUDA_VISIBLE_DEVICES=visible)
    assert accelerator == (["cpu"] if count == "0" else [])

"""launch/deepspeed.sh: signals reach the processes that train, and the exit code is theirs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]
LIMIT_SECONDS = 90.0
SECOND = (pytest.mark.slow, pytest.mark.exhaustive)  # it goes the way of the first
# Stands for train.py: notes which signals come, saves for a while, and leaves with the exit code of a saved run.
TRAINING = """
import os, signal, sys, time
from pathlib import Path

folder = Path(__file__).parent

def leave(number, frame):
    with (folder / f"signals-{os.environ['RANK']}").open("a") as stream:
        stream.write(signal.Signals(number).name + " ")
    time.sleep(0.5)
    os._exit(75)

for name in ("SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), leave)
(folder / f"ready-{os.environ['RANK']}").touch()
for _ in range(600):
    time.sleep(0.1)
    if (folder / "die").exists():
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "launch").mkdir()
    for name in ("deepspeed.sh", "deepspeed.py", "env.sh"):
        (tmp_path / "launch" / name).symlink_to(ROOT / "launch" / name)
    (tmp_path / "train.py").write_text(TRAINING)
    return tmp_path


def start(project: Path) -> subprocess.Popen[bytes]:
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environ |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    command = ["bash", str(project / "launch/deepspeed.sh"), "--num_gpus", "2", "--master_port", "0", "--"]
    return subprocess.Popen(
        command, env=environ, stdout=(project / "log").open("wb"), stderr=subprocess.STDOUT, start_new_session=True
    )


def command_line(process: psutil.Process) -> list[str]:
    """Its arguments; none if it has just ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, "the processes never started"
        time.sleep(0.02)


def check_end(process: subprocess.Popen[bytes], project: Path, family: list[psutil.Process], code: int) -> None:
    """The exit code, and that nothing of it is left."""
    try:
        assert process.wait(LIMIT_SECONDS) == code, (project / "log").read_text()
        psutil.wait_procs(family, 5)
        assert not any(command_line(child) for child in family if child.is_running())
    finally:
        for child in family:
            if child.is_running():
                child.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=SECOND)])
def test_signal_reaches_each_process_once_and_the_exit_code_is_theirs(project: Path, number: signal.Signals) -> None:
    process = start(project)
    wait_for(project / "ready-0", project / "ready-1")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 4  # deepspeed.py, the runner, the launcher, two ranks
    process.send_signal(number)
    check_end(process, project, family, 75)
    assert [(project / f"signals-{rank}").read_text() for rank in (0, 1)] == [f"{number.name} "] * 2


@pytest.mark.slow
def test_processes_that_are_killed_give_the_exit_code_of_a_shell(project: Path) -> None:
    (project / "die").touch()
    process = start(project)
    assert process.wait(LIMIT_SECONDS) == 128 + signal.SIGKILL, (project / "log").read_text()


@pytest.mark.slow
def test_signal_before_the_processes_exist_is_not_lost(project: Path) -> None:
    process = start(project)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (family := [p for p in psutil.Process(process.pid).children(True) if "runner" in str(command_line(p))]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    family += psutil.Process(process.pid).children(recursive=True)
    assert process.wait(LIMIT_SECONDS) in (75, 128 + signal.SIGTERM), (project / "log").read_text()
    check_end(process, project, family, process.returncode)

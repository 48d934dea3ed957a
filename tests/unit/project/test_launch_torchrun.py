"""launch/torchrun.sh: variables checked before anything starts, and the exit code of train.py, also after a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NPROC": "x"}, "NPROC=x is not a whole number from 1 to 1024"),
        ({"NPROC": "0"}, "NPROC=0 is not a whole number"),
        ({"NPROC": "08"}, "NPROC=08 is not a whole number"),
        ({"NNODES": "two"}, "NNODES=two is neither a number of hosts nor MIN:MAX"),
        ({"NNODES": "3:2", "HEAD": "a"}, "NNODES=3:2 is neither"),
        ({"NNODES": "2"}, "NNODES=2, but HEAD is not set"),
        ({"NNODES": "2", "HEAD": "two words"}, "HEAD=two\\ words is not a host's name"),
        ({"NNODES": "2", "HEAD": "node01:29500"}, "HEAD=node01:29500 is a host with a port; the port goes into PORT"),
        ({"NNODES": "2", "HEAD": "node01:"}, "HEAD=node01: is a host with a port"),
        ({"NNODES": "2", "HEAD": "node01..cluster"}, "HEAD=node01..cluster has a part between dots that is empty"),
        ({"NNODES": "2", "HEAD": "n" * 64}, f"HEAD={'n' * 64} has a part between dots that is empty or longer"),
        ({"PORT": "99999"}, "PORT=99999 is not a whole number from 1 to 65535"),
        ({"RESTARTS": "-1"}, "RESTARTS=-1 is not a whole number"),
        ({"SAVE_SECONDS": "1.5"}, "SAVE_SECONDS=1.5 is not a whole number"),
    ],
)
def test_wrong_variable_is_refused_in_one_line(variables, said):
    environ = {"PATH": os.environ["PATH"], **variables}
    done = subprocess.run([ROOT / "launch/torchrun.sh"], env=environ, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"[torchrun.sh] error: {said}")
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_double_dash_is_refused():
    done = subprocess.run([ROOT / "launch/torchrun.sh", "--", "a=b"], capture_output=True, text=True)
    assert done.returncode == 2 and "no -- is needed" in done.stderr


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("torchrun.sh", ["NPROC", "NNODES", "HEAD", "PORT", "JOB", "RESTARTS", "SAVE_SECONDS", "train.py --help"]),
        ("deepspeed.sh", ["--num_gpus", "--hostfile", "train.py --help"]),
    ],
)
def test_help_explains_the_scripts_own_variables(script, words):
    done = subprocess.run([ROOT / "launch" / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert [word for word in words if word not in done.stdout] == []


# Stands for train.py, which ends with an exit code of its own and leaves it for the launcher.
TRAINING = """
import os, signal, sys, time
from pathlib import Path

folder, what = Path(sys.argv[1]), sys.argv[2]

def leave(code):
    with open(os.environ["MOEPP_EXIT_CODES"], "a") as stream:
        stream.write(f"{code}\\n")
    os._exit(code)

signal.signal(signal.SIGUSR1, lambda *_: leave(75))
starts = folder / f"starts-{os.environ['RANK']}"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if what == "refuse":
    leave(2)
if what == "die" and os.environ["RANK"] == "1" and len(starts.read_text()) == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    time.sleep(60)
"""


class Launch:
    """launch/torchrun.sh with a stand-in for train.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "launch").mkdir()
        for name in ("torchrun.sh", "torchrun.py", "env.sh"):
            (folder / "launch" / name).symlink_to(ROOT / "launch" / name)
        (folder / "train.py").write_text(TRAINING)

    def start(self, what: str, **variables: str) -> subprocess.Popen[str]:
        folder = Path(sys.executable).parent
        environ = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "NPROC": "2", **variables}
        command = ["bash", str(self.folder / "launch/torchrun.sh"), str(self.folder), what]
        return subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)

    def wait_for_ranks(self) -> None:
        deadline = time.monotonic() + 120
        while not all((self.folder / f"starts-{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path)


def test_signal_to_torchrun_reaches_the_processes_whose_exit_code_it_takes(launch):
    process = launch.start("wait")
    launch.wait_for_ranks()
    process.send_signal(signal.SIGUSR1)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 75, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("what", "variables", "code", "starts"),
    [
        ("refuse", {}, 2, 1),
        ("die", {}, 137, 1),
        pytest.param("die", {"RESTARTS": "1"}, 0, 2, marks=pytest.mark.slow),
        pytest.param("end", {}, 0, 1, marks=pytest.mark.slow),
    ],
)
def test_exit_code_is_that_of_the_processes(launch, what, variables, code, starts):
    process = launch.start(what, **variables)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == code, errors
    assert len((launch.folder / "starts-1").read_text()) == starts
    assert "Traceback" not in errors
    assert ("rank 1 was ended by SIGKILL" in errors) == (code == 137)

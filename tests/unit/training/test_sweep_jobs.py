"""Processes of a sweep: exit codes, the summary, and signals. The jobs are small programs that stand for training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moepp.errors import ConfigError
from moepp.training import jobs as training_jobs
from moepp.training.jobs import Job, run_jobs

ROOT = Path(__file__).resolve().parents[3]
LIMIT_SECONDS = 120.0  # on a busy machine
# Reads its configuration, does as it says, and writes down which signals came.
PROGRAM = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True)
tree = json.loads(sys.stdin.readline())
def note(number, frame):
    with (folder / "signals").open("a") as f: f.write(signal.Signals(number).name + " ")
    time.sleep(0.5)  # saving takes a while, in which a second signal would be noticed
    sys.exit(130 if number == signal.SIGINT else 75)
for name in ("SIGINT", "SIGTERM", "SIGUSR1"): signal.signal(getattr(signal, name), note)
records = {"train/loss": 4.25}, {"train/loss": None, "eval/loss": 4.5}, {"eval/wiki/loss": 4.75, "eval/wiki/acc": 1}
lines = [json.dumps({"step": 1, "tokens": 8} | record) + "\\n" for record in records]
(folder / "metrics.jsonl").write_text("".join(lines))
(folder / "group").write_text(str(os.getpgrp()))
(folder / "ready").touch()
if tree.get("wait"):
    if not sys.stdin.read(): (folder / "alone").touch()
if "kill" in tree: os.kill(os.getpid(), tree["kill"])
sys.exit(tree.get("code", 0))
"""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_jobs, "_COMMAND", (sys.executable, "-c", PROGRAM))


def job(folder: Path, num: int, **tree: object) -> Job:
    return Job(num, f"key={num}", str(folder / f"run-{num}"), dict(tree), None)


def test_job_that_fails_does_not_end_the_sweep(tmp_path, capfd):
    bad = Job(1, "key=1", str(tmp_path / "run-1"), None, ConfigError("key=1 is too small; raise it"))
    others = [job(tmp_path, 2, code=4), job(tmp_path, 3, kill=9), job(tmp_path, 4)]
    assert run_jobs([job(tmp_path, 0), bad, *others]) == 2, "of the first that failed"
    out, err = capfd.readouterr()
    assert err == "error: job 1 (key=1): key=1 is too small; raise it\n"
    summary = out[out.index("sweep:") :].splitlines()
    assert summary[0] == "sweep: 2 of 5 jobs done"
    ends = ["done, train loss 4.2500, eval loss 4.5000, eval wiki loss 4.7500", "refused: key=1 is too small; raise it"]
    ends += ["failed: training could not go on (exit code 4)", "ended by SIGKILL", ends[0]]
    assert len(summary) == 6
    for i, (line, end) in enumerate(zip(summary[1:], ends, strict=True)):
        assert f"run-{i}" in line and f"key={i}" in line and line.endswith(end)
    assert not (tmp_path / "run-1").exists()


def test_exit_code_is_that_of_the_first_failure(tmp_path):
    assert run_jobs([job(tmp_path, 0), job(tmp_path, 1, kill=9), job(tmp_path, 2, code=4)]) == 128 + 9
    assert run_jobs([job(tmp_path, 3), job(tmp_path, 4)]) == 0


def test_one_reason_for_all_is_raised_once(tmp_path):
    error = ConfigError("same")
    with pytest.raises(ConfigError, match="same"):
        run_jobs([Job(num, "", None, None, error) for num in range(3)])


# A sweep in a process of its own, so that it can be sent signals.
SWEEP = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell,
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and this one under nohup
from tests.unit.training import test_sweep_jobs as t
t.training_jobs._COMMAND = (sys.executable, "-c", t.PROGRAM)
folder = Path(sys.argv[1])
sys.exit(t.run_jobs([t.job(folder, 0), t.job(folder, 1, wait=True), t.job(folder, 2)]))
"""


def start_sweep(folder: Path) -> subprocess.Popen[str]:
    """Start it, and wait until its second job is at work."""
    process = subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    wait_for(folder / "run-1" / "ready")
    return process


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "to_group", "received", "code"),
    [
        (signal.SIGINT, True, "SIGINT ", 130),  # Ctrl-C in a terminal reaches the whole process group
        (signal.SIGINT, False, "SIGINT ", 130),
        (signal.SIGTERM, False, "SIGTERM ", 75),
        (signal.SIGUSR1, True, "SIGUSR1 ", 75),
        (signal.SIGHUP, False, "SIGTERM ", 75),
    ],
)
def test_signal_reaches_the_job_once_and_ends_the_sweep(tmp_path, number, to_group, received, code):
    process = start_sweep(tmp_path)
    # In the sweep's group the job would get it twice; two that arrive at once count as one, so look at the cause too.
    assert int((tmp_path / "run-1" / "group").read_text()) not in (process.pid, os.getpgrp())
    (os.killpg if to_group else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == code, output
    assert (tmp_path / "run-1" / "signals").read_text() == received
    assert not (tmp_path / "run-2").exists()
    assert "1 of 3 jobs done" in output and "not started" in output and "start the same command again" in output


def test_job_stopped_from_outside_ends_the_sweep(tmp_path):
    """A scheduler that signals every process of an allocation may reach the job first."""
    assert run_jobs([job(tmp_path, 0, code=75), job(tmp_path, 1)]) == 75
    assert not (tmp_path / "run-1").exists()


def test_job_notices_that_its_sweep_was_killed(tmp_path):
    process = start_sweep(tmp_path)
    process.kill()
    process.communicate(timeout=LIMIT_SECONDS)
    wait_for(tmp_path / "run-1" / "alone")


def test_pause_holds_the_job_too(tmp_path):
    process = start_sweep(tmp_path)
    [child] = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    for number, letters in ((signal.SIGTSTP, "T"), (signal.SIGCONT, "SR")):
        os.kill(process.pid, number)
        deadline = time.monotonic() + LIMIT_SECONDS
        while not all(_state(pid) in letters for pid in (process.pid, child)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    process.kill()
    process.communicate(timeout=LIMIT_SECONDS)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

"""The Slurm scripts on stand-ins for Slurm: large allocations, any job name, and a save before the job is requeued."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[3]

SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
"show hostnames") seq -f 'node%013.0f' 1 "${NODES:-2}" ;;
"show config") echo 'KillWait                = 45 sec' ;;
requeue*) echo "$2" >>"$FOLDER/requeued" ;;
esac
"""
# Ends when it is told to, as the processes of a step do after a save.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$FOLDER/arguments"
env >"$FOLDER/environment"
trap 'echo USR1 >"$FOLDER/signalled"; exit "$SRUN_CODE"' USR1
touch "$FOLDER/started"
[[ -z "${SRUN_WAITS:-}" ]] || for _ in {1..200}; do sleep 0.1; done
exit "$SRUN_CODE"
"""


class Job:
    """A submitted job: the scripts in a project's folder, and Slurm's commands beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.project = folder / "a project"
        shutil.copytree(ROOT / "launch", self.project / "launch")
        (self.project / "train.py").touch()
        (folder / "bin").mkdir()
        for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def start(self, *arguments: str, script: str = "train", code: int = 0, **variables: str) -> subprocess.Popen[str]:
        environ = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "FOLDER": str(self.folder),
            "SLURM_SUBMIT_DIR": str(self.project),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "moepp",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": variables.get("NODES", "2"),
            "SRUN_CODE": str(code),
            **variables,
        }
        command = ["bash", str(self.project / f"launch/slurm/{script}.sbatch"), *arguments]
        return subprocess.Popen(
            command, env=environ, cwd=self.project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str, **options: str | int) -> tuple[int, str, str]:
        """Exit code, standard output and errors."""
        process = self.start(*arguments, **options)  # type: ignore[arg-type]
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    @property
    def keys(self) -> list[str]:
        """What train.py would get."""
        arguments = (self.folder / "arguments").read_text().splitlines()
        return arguments[arguments.index("launch/torchrun.sh") + 1 :]

    @property
    def requeued(self) -> list[str]:
        """The ids that Slurm was asked to requeue."""
        file = self.folder / "requeued"
        return file.read_text().splitlines() if file.exists() else []

    def near_its_time_limit(self, *arguments: str, **options: str | int) -> tuple[int, str]:
        """Exit code and output of a job that Slurm signals while it trains; it must not requeue itself before."""
        process = self.start(*arguments, **options, SRUN_WAITS="yes")  # type: ignore[arg-type]
        deadline = time.monotonic() + 120
        while not (self.folder / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.requeued == []
        process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=120)
        assert (self.folder / "signalled").exists() and "time is nearly up; saving" in out
        return process.returncode, out + err


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def read_by_hydra(override: str) -> str:
    value = OverridesParser.create().parse_override(override).value()
    return OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)["value"]  # type: ignore[index]


@pytest.mark.parametrize("nodes", ["1", "20000"])  # 20,000 names: more than a pipe holds
def test_job_of_any_size_starts_at_its_first_node(job, nodes):
    code, out, err = job.run("optim.lr=1", NODES=nodes)
    assert (code, err) == (0, "")
    assert f"{nodes} nodes meet at node0000000000001:24711" in out and "KillWait=45 sec" in out
    assert job.keys == ['run.name="moepp-4711"', "optim.lr=1"]
    environment = (job.folder / "environment").read_text().splitlines()
    assert {f"NNODES={nodes}", "HEAD=node0000000000001", "PORT=24711", "JOB=4711"} <= set(environment)


def test_failure_to_name_the_nodes_is_said(job):
    (job.folder / "bin/scontrol").write_text("#!/bin/sh\nexit 1\n")
    code, _, err = job.run()
    assert code == 2 and "error: scontrol names no nodes for node[1-2]" in err and err.count("\n") == 1


NAMES = ["plain", "a,b", "a=b", "{x", "[y", "(z", 'say "hi"', "it's", "résumé", "日本", "${oc.env:HOME}", "a b", "null"]
NAMES += [
    "\\${oc.env:HOME}",
    "\\\\${x}",
    "end\\",
    'q\\"',
    'q\\\\"x',
    "${",
    "$(id)",
    "`id`",
    "%j",
    "#1",
    "-rf",
    "~x",
    "a:b",
]


@pytest.mark.parametrize("name", NAMES)
def test_job_of_any_name_gives_a_run_of_that_name(job, name):
    assert job.run(SLURM_JOB_NAME=name)[0] == 0
    assert read_by_hydra(job.keys[0]) == f"{name}-4711"


@pytest.mark.parametrize(("name", "run"), [("a/b", "a-b-4711"), ("../x", "..-x-4711"), ("x\ty\n", "x-y--4711")])
def test_job_name_that_is_no_folder_name_is_changed(job, name, run):
    assert job.run(SLURM_JOB_NAME=name)[0] == 0
    assert read_by_hydra(job.keys[0]) == run


@pytest.mark.parametrize(
    ("code", "requeued", "said"),
    [
        (75, ["4711"], "job 4711: saved; requeueing"),
        (143, ["4711"], "ended with 143 before it had saved; requeueing"),
        (0, [], ""),
        (2, [], "error: not requeued: the processes ended with exit code 2"),
    ],
)
def test_job_near_its_time_limit_saves_and_only_then_requeues(job, code, requeued, said):
    got, output = job.near_its_time_limit(code=code)
    assert got == code and job.requeued == requeued and said in output


@pytest.mark.parametrize("script", ["sweep", "train"])
@pytest.mark.parametrize("array", ["4711", "4700"])  # one task has the array's number as its own
def test_task_of_an_array_requeues_itself_alone(job, script, array):
    (job.project / "sweep.txt").write_text("optim.lr=1\noptim.lr=2\n")
    task = {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": "2"}
    arguments = ["sweep.txt"] if script == "sweep" else ["optim.lr=2"]
    code, output = job.near_its_time_limit(*arguments, script=script, code=75, **task)
    assert code == 75 and job.requeued == [f"{array}_2"]
    said = re.findall(r"job (\S+)[:,]", output)
    assert len(said) == 3 and set(said) == {f"{array}_2"}, output
    assert job.keys == ['run.name="moepp-4711"', "optim.lr=2"]  # as Slurm counts it: the same after every requeue


@pytest.mark.parametrize("code", [0, 2, 75, 137])
def test_job_that_ends_by_itself_is_not_requeued(job, code):
    assert job.run(code=code)[0] == code
    assert job.requeued == []


def test_array_trains_one_line_per_task(job):
    (job.project / "sweep file.txt").write_text("optim.lr=1\n\noptim.lr=2 model.moe.tau=0.5\n")
    sweep = {"script": "sweep", "SLURM_ARRAY_TASK_ID": "3"}
    assert job.run("sweep file.txt", "engine=native", **sweep)[0] == 0
    assert job.keys[1:] == ["engine=native", "optim.lr=2", "model.moe.tau=0.5"]


@pytest.mark.parametrize(
    ("file", "task", "said"),
    [
        ("sweep.txt", "0", "has no line 0"),
        ("sweep.txt", "2", "has no line 2, or an empty one"),
        ("sweep.txt", "9", "has no line 9"),
        ("none.txt", "1", "cannot read none.txt"),
    ],
)
def test_array_without_a_line_for_a_task_is_refused(job, file, task, said):
    (job.project / "sweep.txt").write_text("optim.lr=1\n  \n")
    code, _, err = job.run(file, script="sweep", SLURM_ARRAY_TASK_ID=task)
    assert code == 2 and said in err and err.count("\n") == 1
    assert not (job.folder / "started").exists()

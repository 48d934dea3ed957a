"""What the launcher says: torchrun's and deepspeed's variables, srun's, or none for one process."""

from __future__ import annotations

import pytest

from moepp.errors import ConfigError
from moepp.parallel.groups import LaunchEnvironment, read_launch_environment
from moepp.parallel.refusal import print_once

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_no_variables_mean_one_process():
    assert read_launch_environment({}) == LaunchEnvironment(0, 1, 0)


def test_torchrun_and_deepspeed():
    environ = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MASTER}
    assert read_launch_environment(environ) == LaunchEnvironment(3, 8, 1)


def test_srun_without_a_launcher():
    environ = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", **MASTER}
    assert read_launch_environment(environ) == LaunchEnvironment(5, 8, 1)


def test_one_task_of_slurm_is_one_process():
    assert read_launch_environment({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) == LaunchEnvironment(0, 1, 0)


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({"RANK": "0", **MASTER}, "but not WORLD_SIZE"),
        ({"WORLD_SIZE": "2", **MASTER}, "but not RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "but not MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MASTER}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "first", "WORLD_SIZE": "2", **MASTER}, "RANK='first' is not an integer"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({"SLURM_STEP_NUM_TASKS": "4", **MASTER}, "SLURM_PROCID=None is not an integer"),
    ],
)
def test_contradictory_variables_are_refused(environ, part):
    with pytest.raises(ConfigError) as caught:
        read_launch_environment(environ)
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "spoken"),
    [
        ({}, True),
        ({"RANK": "0", **MASTER}, True),
        ({"RANK": "1", **MASTER}, False),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, False),
    ],
)
def test_one_rank_speaks_where_the_ranks_cannot_meet(monkeypatch, capsys, environ, spoken):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *MASTER, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    print_once("error: all wrong")
    assert capsys.readouterr().err == ("error: all wrong\n" if spoken else "")

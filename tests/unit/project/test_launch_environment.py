"""What the launcher says: torchrun's and deepspeed's variables, srun's, or none for one process."""

from __future__ import annotations

import socket

import pytest

from moepp.distributed.launch import LaunchEnvironment, read_launch_environment
from moepp.distributed.refusal import print_once
from moepp.errors import ConfigError, LaunchError

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
WHERE = ("10.0.0.1", 29500)
TWO = {"RANK": "1", "WORLD_SIZE": "2", **MASTER}


def test_no_variables_mean_one_process():
    assert read_launch_environment({}) == LaunchEnvironment(0, 1, 0)


def test_torchrun_and_deepspeed():
    environ = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", **MASTER}
    assert read_launch_environment(environ) == LaunchEnvironment(3, 8, 1, WHERE, local_size=2)


def test_srun_without_a_launcher():
    environ = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", **MASTER}
    assert read_launch_environment(environ) == LaunchEnvironment(5, 8, 1, WHERE)


@pytest.mark.parametrize(
    ("tasks_per_node", "node", "local_size"),
    [
        *(("4", "0", 4), ("8(x2),4", "1", 8), ("8(x2),4", "2", 4)),
        *(("8(x2),4", "3", None), ("4", "x", None), ("", "0", None), ("8(x2", "0", None)),
    ],
)
def test_srun_tells_how_many_processes_a_host_has(tasks_per_node, node, local_size):
    environ = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "20", "SLURM_LOCALID": "1", **MASTER}
    environ |= {"SLURM_STEP_TASKS_PER_NODE": tasks_per_node, "SLURM_NODEID": node}
    assert read_launch_environment(environ) == LaunchEnvironment(5, 20, 1, WHERE, local_size)


@pytest.mark.parametrize("more", [{}, {"SLURM_NTASKS": "8"}, {"PMI_SIZE": "1"}, MASTER])
def test_one_task_of_slurm_is_one_process(more):
    environ = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", **more}
    assert read_launch_environment(environ) == LaunchEnvironment(0, 1, 0)


@pytest.mark.parametrize("host", ["node-1.cluster_a", "::1", "fe80::1%eth0", "127.0.0.1", "node1.cluster.", "n" * 63])
def test_names_and_addresses_of_every_kind(host):
    assert read_launch_environment({**TWO, "MASTER_ADDR": host}).master == (host, 29500)


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({"RANK": "0", **MASTER}, "but not WORLD_SIZE"),
        ({"WORLD_SIZE": "2", **MASTER}, "but not RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "but not MASTER_ADDR, MASTER_PORT"),
        ({**TWO, "RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({**TWO, "RANK": "-1"}, "RANK=-1 is negative"),
        ({**TWO, "WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not a number of processes"),
        ({**TWO, "WORLD_SIZE": "-2"}, "WORLD_SIZE=-2 is not a number of processes"),
        ({**TWO, "WORLD_SIZE": "999999999"}, "WORLD_SIZE=999999999 is not a number of processes"),
        ({**TWO, "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9999"),
        ({**TWO, "WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0' is not an integer"),
        ({**TWO, "RANK": "first"}, "RANK='first' is not an integer"),
        ({**TWO, "RANK": ""}, "RANK='' is not an integer"),
        ({**TWO, "RANK": " 1"}, "RANK=' 1' is not an integer"),
        ({**TWO, "RANK": "\u0661"}, "RANK='\\u0661' is not an integer"),
        ({**TWO, "RANK": "1\nerror: x"}, "RANK='1\\nerror: x' is not an integer"),
        ({**TWO, "LOCAL_RANK": "x"}, "LOCAL_RANK='x' is not an integer"),
        ({**TWO, "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 is negative"),
        ({**TWO, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 is not below WORLD_SIZE=2"),
        ({**TWO, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 is not below LOCAL_WORLD_SIZE=1"),
        ({**TWO, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE='two' is not an integer"),
        ({**TWO, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4 is above WORLD_SIZE=2"),
        ({**TWO, "LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE=2 is set but LOCAL_RANK is not"),
        ({**TWO, "NODE_RANK": "head"}, "NODE_RANK='head' is not an integer"),
        ({**TWO, "MASTER_PORT": "abc"}, "MASTER_PORT='abc' is not an integer"),
        ({"RANK": "0", "WORLD_SIZE": "1", **MASTER, "MASTER_PORT": "abc"}, "MASTER_PORT='abc' is not an integer"),
        ({**TWO, "MASTER_PORT": "0"}, "MASTER_PORT=0 is not a port"),
        ({**TWO, "MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not a port"),
        ({**TWO, "MASTER_ADDR": ""}, "MASTER_ADDR='' is not a host name"),
        (
            {**TWO, "MASTER_ADDR": "node01..cluster"},
            "MASTER_ADDR='node01..cluster' has a part between dots that is empty",
        ),
        ({**TWO, "MASTER_ADDR": ".node01"}, "MASTER_ADDR='.node01' has a part between dots that is empty"),
        ({**TWO, "MASTER_ADDR": "node01.."}, "MASTER_ADDR='node01..' has a part between dots that is empty"),
        ({**TWO, "MASTER_ADDR": "."}, "MASTER_ADDR='.' has a part between dots that is empty"),
        ({**TWO, "MASTER_ADDR": "n" * 64}, "nn... has a part between dots that is empty or longer than 63"),
        ({**TWO, "MASTER_ADDR": "fe80::1%" + "e" * 60}, "has a part between dots that is empty or longer than 63"),
        ({**TWO, "MASTER_ADDR": "two words"}, "MASTER_ADDR='two words' is not a host name"),
        ({**TWO, "GLOO_SOCKET_IFNAME": "eth99"}, "GLOO_SOCKET_IFNAME='eth99' names an interface that"),
        ({**TWO, "GLOO_SOCKET_IFNAME": "lo,"}, "GLOO_SOCKET_IFNAME='lo,' names an interface that"),
        ({"GLOO_SOCKET_IFNAME": "l\no"}, "'l\\no' names an interface that"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK='1' is set but RANK and WORLD_SIZE are not"),
        ({"LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE='2' is set but RANK and WORLD_SIZE are not"),
        ({"OMPI_COMM_WORLD_SIZE": "2", **MASTER}, "each process would train alone"),
        ({"PMI_SIZE": "4"}, "export RANK=$PMI_RANK"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({"SLURM_STEP_NUM_TASKS": "4", **MASTER}, "SLURM_PROCID is not set"),
        ({"SLURM_STEP_NUM_TASKS": "four", **MASTER}, "SLURM_STEP_NUM_TASKS='four' is not an integer"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "4", **MASTER}, "SLURM_PROCID=4 is not below"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "x", **MASTER}, "SLURM_PROCID='x' is not an integer"),
        (
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "y", **MASTER},
            "SLURM_LOCALID='y' is not an integer",
        ),
    ],
)
def test_contradictory_variables_are_refused(environ, part):
    with pytest.raises(LaunchError) as caught:
        read_launch_environment(environ)
    message = str(caught.value)
    assert part in message and "\n" not in message and len(message) < 400
    assert isinstance(caught.value, ConfigError) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"RANK": "0", **MASTER},
        {"RANK": "1", **MASTER},
        {"RANK": "x", "WORLD_SIZE": "2", **MASTER},
        {"RANK": "3", "WORLD_SIZE": "2", **MASTER},
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"},
    ],
)
def test_each_rank_speaks_where_the_ranks_cannot_meet(monkeypatch, capsys, environ):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *MASTER, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    print_once("all wrong")
    assert capsys.readouterr().err == "error: all wrong\n"


def test_interfaces_of_this_host_are_taken():
    names = ",".join(name for _, name in socket.if_nameindex())
    for given in (names, ""):
        assert read_launch_environment({**TWO, "GLOO_SOCKET_IFNAME": given}).world_size == 2

"""What the launcher says about this process: rank, number of ranks, where they meet.

Read from torchrun's and deepspeed's variables, or from ``srun`` without them. Whatever is wrong with them is an error
of this process alone: the ranks cannot meet, so each of them says it.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from moepp.errors import LaunchError

_TOGETHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What other launchers call the number of processes; none of them sets RANK.
_FOREIGN = {"OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK", "PMI_SIZE": "PMI_RANK"}
_MAX_PROCESSES = 1 << 20
_REMEDY = "check the launcher"
_EXIT_CODES = "MOEPP_EXIT_CODES"  # a file of launch/torchrun.py, which ends with what it holds; torchrun forgets it


@dataclass(frozen=True)
class LaunchEnvironment:
    """What the launcher says about this process.

    Attributes:
        local_rank: among the processes of this host.
        master: host and port of the meeting; None for one process.
        local_size: processes of this host; None where the launcher does not say.
    """

    rank: int
    world_size: int
    local_rank: int
    master: tuple[str, int] | None = None
    local_size: int | None = None


def read_launch_environment(environ: Mapping[str, str] = os.environ) -> LaunchEnvironment:
    """Return rank and world size from torchrun's and deepspeed's variables, or from ``srun`` without them.

    Raises:
        LaunchError: variables are missing, no numbers, or contradictory. A lone process under a Slurm step (or mpirun)
            of several tasks is refused too: silently becoming one of many one-process worlds would train nothing.
    """
    _require_interfaces(environ)
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_variables(environ)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if name in environ:
            raise LaunchError(
                f"{name}={_show(environ[name])} is set but RANK and WORLD_SIZE are not; start with torchrun, "
                f"deepspeed or srun, or unset {name} for one process"
            )
    return _from_slurm(environ)


def record_exit_code(code: int) -> None:
    """Tell the launcher with which code this process is about to end."""
    if path := os.environ.get(_EXIT_CODES):
        with contextlib.suppress(OSError), open(path, "a") as stream:
            stream.write(f"{code}\n")


def _from_variables(environ: Mapping[str, str]) -> LaunchEnvironment:
    missing = [name for name in _TOGETHER if name not in environ]
    if missing:
        raise LaunchError(
            f"the launcher set some of {', '.join(_TOGETHER)} but not {', '.join(missing)}; start with torchrun, "
            "deepspeed or srun, or unset them for one process"
        )
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    _require_place("RANK", rank, "WORLD_SIZE", world_size)
    local_rank, local_size = _number(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else 0, None
    if "LOCAL_WORLD_SIZE" in environ:
        local_size = _number(environ, "LOCAL_WORLD_SIZE")
        if "LOCAL_RANK" not in environ and local_size > 1:
            raise LaunchError(f"LOCAL_WORLD_SIZE={local_size} is set but LOCAL_RANK is not; {_REMEDY}")
        _require_place("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_size)
        if local_size > world_size:
            raise LaunchError(f"LOCAL_WORLD_SIZE={local_size} is above WORLD_SIZE={world_size}; {_REMEDY}")
    _require_place("LOCAL_RANK", local_rank, "WORLD_SIZE", world_size)
    for name in ("GROUP_RANK", "NODE_RANK"):
        if name in environ:
            _number(environ, name)
    return LaunchEnvironment(rank, world_size, local_rank, _master(environ), local_size)


def _from_slurm(environ: Mapping[str, str]) -> LaunchEnvironment:
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in environ else 1
    if tasks == 1:
        _refuse_foreign(environ)
        return LaunchEnvironment(0, 1, 0)
    rank = _number(environ, "SLURM_PROCID")
    _require_place("SLURM_PROCID", rank, "SLURM_STEP_NUM_TASKS", tasks)
    local_rank = _number(environ, "SLURM_LOCALID") if "SLURM_LOCALID" in environ else 0
    _require_place("SLURM_LOCALID", local_rank, "SLURM_STEP_NUM_TASKS", tasks)
    if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
        raise LaunchError(
            f"srun started {tasks} tasks but MASTER_ADDR and MASTER_PORT are not set, so they cannot find each other; "
            "export both, or let srun start torchrun"
        )
    return LaunchEnvironment(rank, tasks, local_rank, _master(environ), _tasks_of_node(environ))


def _tasks_of_node(environ: Mapping[str, str]) -> int | None:
    """Read this node's entry of Slurm's list of tasks per node, such as ``8(x2),4``; None: there is none."""
    counts = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if match is None:
            return None
        counts.append((int(match[1]), int(match[2] or 1)))
    node = environ.get("SLURM_NODEID", "")
    if not re.fullmatch(r"[0-9]{1,6}", node):
        return None
    first = 0
    for tasks, nodes in counts:
        first += nodes
        if int(node) < first:
            return tasks
    return None


def _refuse_foreign(environ: Mapping[str, str]) -> None:
    for size, rank in _FOREIGN.items():
        if size in environ and _number(environ, size) > 1:
            raise LaunchError(
                f"{size}={environ[size]} but RANK and WORLD_SIZE are not set, so each process would train alone; "
                f"export RANK=${rank}, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or start with torchrun"
            )


def _require_interfaces(environ: Mapping[str, str]) -> None:
    """Refuse names of network interfaces that this host lacks: gloo would fail when all ranks have met."""
    given, there = environ.get("GLOO_SOCKET_IFNAME", ""), [name for _, name in socket.if_nameindex()]
    missing = [name for name in given.split(",") if name not in there] if given else []
    if missing:
        raise LaunchError(
            f"GLOO_SOCKET_IFNAME={_show(given)} names an interface that {socket.gethostname()} does not have; name one "
            f"of {', '.join(there)}, or unset it"
        )


def _require_place(name: str, value: int, size_name: str, size: int) -> None:
    if not 1 <= size <= _MAX_PROCESSES:
        raise LaunchError(f"{size_name}={size} is not a number of processes (1 to {_MAX_PROCESSES:,}); {_REMEDY}")
    if value < 0:
        raise LaunchError(f"{name}={value} is negative; {_REMEDY}")
    if value >= size:
        raise LaunchError(f"{name}={value} is not below {size_name}={size}; {_REMEDY}")


def _master(environ: Mapping[str, str]) -> tuple[str, int]:
    host, port = environ["MASTER_ADDR"], _number(environ, "MASTER_PORT")
    if not re.fullmatch(r"[A-Za-z0-9._:%-]{1,255}", host):
        raise LaunchError(f"MASTER_ADDR={_show(host)} is not a host name or address; {_REMEDY}")
    # What no resolver takes; Python would not even ask one. A name may end with a dot.
    if not all(1 <= len(label) <= 63 for label in host.removesuffix(".").split(".")):
        raise LaunchError(
            f"MASTER_ADDR={_show(host)} has a part between dots that is empty or longer than 63 characters; name rank "
            "0's host"
        )
    if not 1 <= port <= 65535:
        raise LaunchError(f"MASTER_PORT={port} is not a port (1 to 65535); {_REMEDY}")
    return host, port


def _number(environ: Mapping[str, str], name: str) -> int:
    """Return a variable's value, plain digits alone: int() takes ' 1_0 ' and digits of other scripts."""
    value = environ.get(name)
    if value is None:
        raise LaunchError(f"{name} is not set; {_REMEDY}")
    if not re.fullmatch(r"-?[0-9]{1,9}", value):
        raise LaunchError(f"{name}={_show(value)} is not an integer; {_REMEDY}")
    return int(value)


def _show(value: str) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

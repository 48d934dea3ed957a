"""Process groups: built once, frozen, passed down.

Every rank is data parallel: it has its own tokens. Ranks are split in expert-parallel (EP) groups of P consecutive
ranks that share one set of FFN experts; the ranks that hold the same experts form an expert-data-parallel (EDP)
group.  8 ranks, P = 4:  EP {0 1 2 3} {4 5 6 7},  EDP {0 4} {1 5} {2 6} {3 7}.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from moepp.errors import ConfigError, PeerError


@dataclass(frozen=True)
class LaunchEnvironment:
    """What the launcher says about this process."""

    rank: int
    world_size: int
    local_rank: int


@dataclass(frozen=True)
class ParallelGroups:
    """This process's place among the others.

    Attributes:
        world: all ranks (data parallel).
        ep: the ranks that share one set of FFN experts, this one among them.
        edp: the ranks that hold the same FFN experts as this one.
    """

    rank: int
    world_size: int
    ep_size: int
    device: torch.device
    world: dist.ProcessGroup
    ep: dist.ProcessGroup
    edp: dist.ProcessGroup

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep_size

    @property
    def edp_size(self) -> int:
        return self.world_size // self.ep_size


def read_launch_environment(environ: Mapping[str, str] = os.environ) -> LaunchEnvironment:
    """Rank and world size from torchrun's and deepspeed's variables, or from ``srun`` without them.

    Raises:
        ConfigError: variables are missing or contradictory. A lone process under a Slurm step of several tasks is
            refused too: silently becoming one of many one-process worlds would train nothing.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in environ]
        if missing:
            raise ConfigError(
                f"the launcher set some of {', '.join(names)} but not {', '.join(missing)}; start with torchrun, "
                "deepspeed or srun, or unset them for one process"
            )
        rank, world_size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
        if not 0 <= rank < world_size:
            raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={world_size}; check the launcher")
        return LaunchEnvironment(rank, world_size, int(environ.get("LOCAL_RANK", "0")))
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1:
        return LaunchEnvironment(0, 1, 0)
    if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
        raise ConfigError(
            f"srun started {tasks} tasks but MASTER_ADDR and MASTER_PORT are not set, so they cannot find each other; "
            "export both, or let srun start torchrun"
        )
    return LaunchEnvironment(_integer(environ, "SLURM_PROCID"), tasks, int(environ.get("SLURM_LOCALID", "0")))


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except (KeyError, ValueError):
        raise ConfigError(f"{name}={environ.get(name)!r} is not an integer; check the launcher") from None


def pick_device(local_rank: int) -> torch.device:
    """This rank's accelerator, or the CPU where there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    device = torch.device(accelerator.type, local_rank)
    torch.accelerator.set_device_index(local_rank)
    return device


def init_process_group(launch: LaunchEnvironment, device: torch.device, timeout_seconds: float) -> Store:
    """Join the default process group; one process gets a group of its own without any network.

    CPU tensors always travel over gloo, the accelerator's over its own backend.

    Returns:
        The key-value store that brought the ranks together.

    Raises:
        PeerError: not all ranks came in time.
    """
    backend = "gloo"
    if device.type != "cpu":
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    timeout = timedelta(seconds=timeout_seconds)
    store: Store = HashStore()
    try:
        if launch.world_size > 1:
            store, _, _ = next(rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = " ".join(str(error).split())[:200]
        raise PeerError(
            f"rank {launch.rank} cannot join the other ranks of {launch.world_size} at {place} within "
            f"parallel.timeout_seconds={timeout_seconds:g} ({reason}); check that all were started"
        ) from error
    return store


def build_groups(ep_size: int, device: torch.device) -> ParallelGroups:
    """Create the expert-parallel and expert-data-parallel groups (collective: call on every rank).

    Raises:
        ConfigError: ``ep_size`` does not divide the number of ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % ep_size:
        raise ConfigError(f"parallel.expert={ep_size} does not divide the {world_size} processes; change one of them")
    ep = _own_group([list(range(start, start + ep_size)) for start in range(0, world_size, ep_size)])
    edp = _own_group([list(range(ep_rank, world_size, ep_size)) for ep_rank in range(ep_size)])
    assert dist.group.WORLD is not None
    return ParallelGroups(rank, world_size, ep_size, device, dist.group.WORLD, ep, edp)


def _own_group(partition: list[list[int]]) -> dist.ProcessGroup:
    """Create a group for each part (all ranks take part in each) and return the one that holds this rank."""
    own, _ = dist.new_subgroups_by_enumeration(partition)
    assert isinstance(own, dist.ProcessGroup)
    return own


def new_cpu_group() -> dist.ProcessGroup:
    """A gloo group of all ranks of its own, for work beside the training loop (collective)."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group

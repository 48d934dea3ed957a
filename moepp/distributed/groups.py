"""Process groups: built once, frozen, passed down.

Every rank is data parallel: it has its own tokens. Ranks are split in expert-parallel (EP) groups of P consecutive
ranks that share one set of FFN experts; the ranks that hold the same experts form an expert-data-parallel (EDP)
group.  8 ranks, P = 4:  EP {0 1 2 3} {4 5 6 7},  EDP {0 4} {1 5} {2 6} {3 7}.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from moepp.distributed.agreement import Facts
from moepp.distributed.launch import LaunchEnvironment, read_launch_environment
from moepp.distributed.meeting import join_store, meet
from moepp.errors import ConfigError, LaunchError, PeerError

__all__ = [
    "LaunchEnvironment",
    "ParallelGroups",
    "build_groups",
    "init_process_group",
    "joined",
    "new_cpu_group",
    "pick_device",
    "read_launch_environment",
]


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


def pick_device(local_rank: int) -> torch.device:
    """This rank's accelerator, or the CPU where there is none.

    Raises:
        LaunchError: this host has fewer accelerators than processes.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise LaunchError(
            f"LOCAL_RANK={local_rank} has no device: this host offers {count} of type {accelerator.type}; start at "
            f"most {count} processes on it, or make more devices visible"
        )
    device = torch.device(accelerator.type, local_rank)
    torch.accelerator.set_device_index(local_rank)
    return device


def init_process_group(
    launch: LaunchEnvironment, device: torch.device, timeout_seconds: float, facts: Facts | None = None
) -> Store:
    """Meet the other ranks, agree with them on ``facts``, and make the default process group.

    One process needs no network.

    CPU tensors always travel over gloo, the accelerator's over its own backend.

    Returns:
        The key-value store that brought the ranks together.

    Raises:
        ConfigError: the ranks' facts differ, or one of them cannot start; the same on every rank.
        PeerError: not all ranks came in time, or one left in between.
    """
    store = meet(join_store(launch, timeout_seconds), launch, facts or {}, timeout_seconds)
    backend = "gloo"
    if device.type != "cpu":
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    timeout = timedelta(seconds=timeout_seconds)
    try:
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise PeerError(
            f"rank {launch.rank} met the other ranks of {launch.world_size} but cannot connect to all of them "
            f"({reason}); look for another rank's error, and check the network between the hosts (GLOO_SOCKET_IFNAME)"
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


@contextmanager
def joined(
    launch: LaunchEnvironment, ep_size: int, timeout_seconds: float, facts: Facts | None = None
) -> Iterator[ParallelGroups]:
    """Process groups for the time of a command, on this rank's device; all of them are left at its end.

    Raises:
        ConfigError: as :func:`init_process_group` and :func:`build_groups`; or the rank has no device.
        PeerError: as :func:`init_process_group`.
    """
    device = pick_device(launch.local_rank)
    init_process_group(launch, device, timeout_seconds, facts)
    try:
        yield build_groups(ep_size, device)
    finally:
        dist.destroy_process_group()


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

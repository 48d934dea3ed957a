"""Process groups: built once, frozen, passed down. Which ranks they hold is in :mod:`moepp.distributed.layout`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from moepp.distributed.agreement import Facts
from moepp.distributed.device import OPTION, pick_device, require_own_devices
from moepp.distributed.launch import LaunchEnvironment, read_launch_environment
from moepp.distributed.layout import Layout
from moepp.distributed.meeting import join_store, meet
from moepp.distributed.session import watched
from moepp.errors import ConfigError, PeerError

HEARTBEAT_SECONDS = 20.0  # as parallel.heartbeat_seconds is by default

__all__ = [
    "LaunchEnvironment",
    "Layout",
    "ParallelGroups",
    "build_groups",
    "connect",
    "init_process_group",
    "joined",
    "new_cpu_group",
    "pick_device",
    "read_launch_environment",
]


@dataclass(frozen=True)
class ParallelGroups:
    """The place of this process among the others.

    Every group is there in every layout; of one rank alone where the layout does not use it.

    Attributes:
        rank: among all ranks.
        layout: who works with whom, in numbers.
        device: this rank's.
        world: all ranks.
        stage, pp, dp, cp, tp, dpcp, replica, ep, edp: this rank's group of each kind of
            :class:`moepp.distributed.layout.Layout`.
    """

    rank: int
    layout: Layout
    device: torch.device
    world: dist.ProcessGroup
    stage: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    cp: dist.ProcessGroup
    tp: dist.ProcessGroup
    dpcp: dist.ProcessGroup
    replica: dist.ProcessGroup
    ep: dist.ProcessGroup
    edp: dist.ProcessGroup

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def stage_size(self) -> int:
        return self.layout.stage_size

    @property
    def ep_size(self) -> int:
        return self.layout.expert

    @property
    def ep_rank(self) -> int:
        return self.rank % self.layout.expert

    @property
    def edp_size(self) -> int:
        return self.layout.stage_size // self.layout.expert

    @property
    def pp_size(self) -> int:
        return self.layout.pipeline

    @property
    def pp_rank(self) -> int:
        return self.layout.coordinates(self.rank).pipeline

    @property
    def cp_rank(self) -> int:
        return self.layout.coordinates(self.rank).context

    @property
    def tp_size(self) -> int:
        return self.layout.tensor

    @property
    def tp_rank(self) -> int:
        return self.layout.coordinates(self.rank).tensor

    @property
    def data_size(self) -> int:
        return self.layout.data

    @property
    def data_rank(self) -> int:
        """Which of the replicas this rank is part of: ranks of one read the same text."""
        return self.layout.coordinates(self.rank).data


def init_process_group(
    launch: LaunchEnvironment,
    device: torch.device,
    timeout_seconds: float,
    facts: Facts | None = None,
    backend: str = "auto",
) -> Store:
    """Meet the other ranks, agree with them on ``facts``, and make the default process group.

    One process needs no network.

    CPU tensors always travel over gloo, the accelerator's over its own backend (NCCL on CUDA), whose connections are
    made at once: a device or a network that does not work shows now. ``backend="gloo"`` has both travel over gloo, and
    then ranks may share a device.

    Returns:
        The key-value store that brought the ranks together.

    Raises:
        ConfigError: the ranks' facts differ, one of them cannot start, or two have one device; the same on every rank.
        PeerError: not all ranks came in time, or one left in between.
    """
    store = meet(join_store(launch, timeout_seconds), launch, facts or {}, timeout_seconds)
    backends = "gloo"
    if device.type != "cpu" and backend != "gloo":
        require_own_devices(store, launch.rank, launch.world_size, device, timeout_seconds)
        # Groups connect when they are made; torch would warn on every rank of what that means for pipelines.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
        backends = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    timeout = timedelta(seconds=timeout_seconds)
    try:
        dist.init_process_group(backends, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
        connect(dist.group.WORLD, device)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise PeerError(
            f"rank {launch.rank} met the other ranks of {launch.world_size} but cannot connect to all of them "
            f"({reason}); look for another rank's error, and check the network between the hosts (GLOO_SOCKET_IFNAME, "
            "NCCL_SOCKET_IFNAME)"
        ) from error
    return store


def connect(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Make the accelerator's connections of a group at once, by all its ranks; else its first collective does so.

    torch does so for a group with ``device_id``, but then makes every later group by splitting the first one, in which
    ranks that are not of the new group must take part; DeepSpeed's groups and ours of few ranks are not made like that.
    """
    if device.type != "cpu" and group is not None and dist.get_world_size(group) > 1:
        group._get_backend(device).eager_connect_single_device(device)


# Kinds in one entry are for sums of gradients, which run one after the other: where they hold the same ranks they share
# a communicator, the world's among them. What runs beside such sums, or beside each other, has one of its own.
_SHARING = (("stage", "dp", "dpcp", "edp"), ("pp",), ("cp",), ("tp",), ("replica",), ("ep",))


def build_groups(layout: Layout, device: torch.device) -> ParallelGroups:
    """Create this rank's groups (collective: call on every rank).

    Raises:
        ConfigError: the layout is for another number of ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if layout.world_size != world_size:
        raise ConfigError(f"the layout is for {layout.world_size} processes, and {world_size} have started; match them")
    assert dist.group.WORLD is not None
    everyone, alone = tuple(range(world_size)), (rank,)
    only_this_rank = dist.group.WORLD if world_size == 1 else _new_group([rank], device)
    own: dict[str, dist.ProcessGroup] = {}
    for kinds in _SHARING:
        made: dict[tuple[int, ...], dist.ProcessGroup] = {alone: only_this_rank}
        if "stage" in kinds:
            made[everyone] = dist.group.WORLD
        for kind in kinds:  # in the same order on every rank: members wait for each other
            ranks = tuple(layout.peers(kind, rank))
            if ranks not in made:
                made[ranks] = _new_group(list(ranks), device)
            own[kind] = made[ranks]
    return ParallelGroups(rank, layout, device, dist.group.WORLD, **own)


@contextmanager
def joined(
    launch: LaunchEnvironment,
    ep_size: int,
    timeout_seconds: float,
    facts: Facts | None = None,
    device: str = "auto",
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
    named: str = OPTION,
) -> Iterator[ParallelGroups]:
    """Process groups for the time of a command, on this rank's device; all of them are left at its end.

    Raises:
        ConfigError: as :func:`init_process_group` and :func:`build_groups`; or the rank has no device.
        PeerError: as :func:`init_process_group`; or another rank was lost.
    """
    own = pick_device(launch.local_rank, device, launch.local_size, named=named)
    store = init_process_group(launch, own, timeout_seconds, {**(facts or {}), "the device": own.type})
    with watched(store, launch, own, heartbeat_seconds, "look for that rank's own error, then start again"):
        yield build_groups(Layout(launch.world_size, expert=ep_size), own)


def _new_group(ranks: list[int], device: torch.device) -> dist.ProcessGroup:
    """Return a group that its members alone have to make; all of them make their groups in the same order."""
    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    connect(group, device)
    return group


def new_cpu_group() -> dist.ProcessGroup:
    """Return a new gloo group of all ranks, for work beside the training loop (collective)."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group

"""Process groups hold the ranks that the layout says, and the groups of a rank alone need nobody."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moepp.distributed import comm, waits
from moepp.distributed.groups import build_groups
from moepp.distributed.layout import KINDS, Layout
from moepp.errors import ConfigError

LAYOUTS = [Layout(4), Layout(4, expert=2), Layout(4, pipeline=2, expert=2), Layout(4, tensor=2), Layout(4, 2, 2)]


def _groups(rank: int, sizes: tuple[int, ...]) -> dict[str, object]:
    groups = build_groups(Layout(*sizes), torch.device("cpu"))
    sums = {}
    for kind in KINDS:
        group = getattr(groups, kind)
        assert dist.get_process_group_ranks(group) == groups.layout.peers(kind, rank), kind
        sums[kind] = int(comm.all_reduce_sum(torch.tensor(10**rank), group))
    waits.limit_waits(60.0)
    places = (groups.pp_rank, groups.data_rank, groups.cp_rank, groups.tp_rank)
    assert places == tuple(groups.layout.coordinates(rank))
    assert groups.ep_rank == groups.layout.peers("ep", rank).index(rank)
    beside = [groups.pp, groups.cp, groups.tp, groups.replica, groups.ep, groups.stage]
    assert len({id(group) for group in beside if comm.size(group) > 1}) == sum(comm.size(g) > 1 for g in beside)
    return sums


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_reduce_over_the_ranks_of_the_layout(pool_4, layout):
    sizes = (layout.world_size, layout.pipeline, layout.context, layout.tensor, layout.expert)
    for rank, sums in enumerate(pool_4.run(_groups, sizes)):
        assert sums == {kind: sum(10**peer for peer in layout.peers(kind, rank)) for kind in KINDS}


def _connected(rank: int) -> list[tuple[tuple[int, ...], str]]:
    """What is connected at once for a GPU while groups are made; here they are gloo's."""
    found: list[tuple[tuple[int, ...], str]] = []

    class Backend:
        def eager_connect_single_device(self, device: torch.device) -> None:
            found.append((ranks[-1], str(device)))

    ranks: list[tuple[int, ...]] = []

    def get_backend(group: dist.ProcessGroup, device: torch.device) -> Backend:
        ranks.append(tuple(dist.get_process_group_ranks(group)))
        return Backend()

    with patch.object(dist.ProcessGroup, "_get_backend", get_backend):
        build_groups(Layout(4, expert=2), torch.device("cuda", 3))
    return found


def test_each_group_of_several_ranks_connects_its_device_when_it_is_made(pool_4):
    for rank, found in enumerate(pool_4.run(_connected)):
        pair, other = (rank // 2 * 2, rank // 2 * 2 + 1), (rank % 2, rank % 2 + 2)
        assert found == [(other, "cuda:3"), (pair, "cuda:3")]  # edp, then ep; the world's was made before


def _wrong_world(rank: int) -> None:
    build_groups(Layout(2), torch.device("cpu"))


def test_layout_of_another_number_of_ranks_is_refused(pool_4):
    assert "2 processes, and 4 have started" in pool_4.run(_wrong_world, raises=ConfigError)[0]

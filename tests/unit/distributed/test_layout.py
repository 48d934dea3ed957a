"""The arithmetic of layouts, for every rank of worlds of up to 4,096."""

from __future__ import annotations

import itertools
import random

import pytest

from moepp.distributed.layout import KINDS, Coordinates, Layout
from moepp.errors import ConfigError


def layouts() -> list[Layout]:
    """Small worlds in every way, large ones drawn at random (always the same)."""
    sizes = itertools.product((1, 2, 3), (1, 2), (1, 2), (1, 2))  # pipeline, data, context, tensor
    found = [(p * d * c * t, p, c, t) for p, d, c, t in sizes]
    pick = random.Random(0)
    for world in (64, 96, 512, 1000, 4096):
        for _ in range(3):
            p = pick.choice(divisors(world))
            c = pick.choice(divisors(world // p))
            t = pick.choice(divisors(world // p // c))
            found.append((world, p, c, t))
    return [
        Layout(world, p, c, t, expert)
        for world, p, c, t in found
        for expert in {1, world // p, pick.choice(divisors(world // p))}
    ]


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


LAYOUTS = layouts()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_of_each_kind_cover_every_rank_once(layout):
    sizes = {
        "stage": layout.stage_size,
        "pp": layout.pipeline,
        "dp": layout.data,
        "cp": layout.context,
        "tp": layout.tensor,
        "dpcp": layout.data * layout.context,
        "replica": layout.context * layout.tensor,
        "ep": layout.expert,
        "edp": layout.stage_size // layout.expert,
    }
    assert set(sizes) == set(KINDS)
    for kind, size in sizes.items():
        groups = layout.partition(kind)
        assert {len(group) for group in groups} == {size}, kind
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size)), kind
        assert all(group == sorted(group) for group in groups) and groups == sorted(groups), kind


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_of_a_group_differ_only_along_its_axes(layout):
    axes = {"stage": "dct", "pp": "p", "dp": "d", "cp": "c", "tp": "t", "dpcp": "dc", "replica": "ct"}
    places = [dict(zip("pdct", layout.coordinates(rank), strict=True)) for rank in range(layout.world_size)]
    sizes = {"p": layout.pipeline, "d": layout.data, "c": layout.context, "t": layout.tensor}
    assert len({tuple(place.values()) for place in places}) == layout.world_size
    assert all(0 <= place[axis] < sizes[axis] for place in places for axis in sizes)
    for kind, free in axes.items():
        for group in layout.partition(kind):
            for axis in set(sizes) - set(free):
                assert len({places[rank][axis] for rank in group}) == 1, (kind, axis)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_experts_are_shared_by_consecutive_ranks_of_one_stage(layout):
    for group in layout.partition("ep"):
        assert group == list(range(group[0], group[0] + layout.expert))
        assert len({layout.coordinates(rank).pipeline for rank in group}) == 1
    for group in layout.partition("edp"):
        assert len({rank % layout.expert for rank in group}) == 1
        assert len({layout.coordinates(rank).pipeline for rank in group}) == 1


@pytest.mark.parametrize("layout", LAYOUTS[::7], ids=str)
def test_rank_and_place_are_each_others_inverse_and_peers_agree(layout):
    for rank in range(layout.world_size):
        assert layout.rank_at(layout.coordinates(rank)) == rank
    for kind in KINDS:
        for group in layout.partition(kind)[:20]:
            assert all(layout.peers(kind, rank) == group for rank in group[:8] + group[-8:])


def test_tensor_varies_fastest_and_the_pipeline_slowest():
    layout = Layout(16, pipeline=2, context=2, tensor=2)
    assert layout.coordinates(0) == Coordinates(0, 0, 0, 0)
    assert layout.coordinates(1) == Coordinates(0, 0, 0, 1)
    assert layout.coordinates(2) == Coordinates(0, 0, 1, 0)
    assert layout.coordinates(4) == Coordinates(0, 1, 0, 0)
    assert layout.coordinates(8) == Coordinates(1, 0, 0, 0)
    assert layout.peers("pp", 3) == [3, 11] and layout.peers("replica", 6) == [4, 5, 6, 7]


def test_chunks_of_a_rank_are_a_pipeline_apart():
    layout = Layout(8, pipeline=4)
    assert [layout.stages_of(rank, 2) for rank in (0, 1, 2, 7)] == [[0, 4], [0, 4], [1, 5], [3, 7]]
    assert sorted(stage for rank in (0, 2, 4, 6) for stage in layout.stages_of(rank, 3)) == list(range(12))


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"pipeline": 3}, ["parallel.pipeline=3", "does not divide the 8 processes"]),
        ({"context": 2, "tensor": 8}, ["parallel.tensor=8", "= 16 does not divide"]),
        ({"expert": 3}, ["parallel.expert=3 does not divide the 8 processes"]),
        ({"pipeline": 4, "expert": 4}, ["parallel.expert=4 does not divide the 2 processes of a pipeline stage"]),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, parts):
    with pytest.raises(ConfigError) as caught:
        Layout(8, **sizes)
    assert all(part in str(caught.value) for part in parts)


def test_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="'world' is not a kind"):
        Layout(8).peers("world", 0)

"""Which ranks work together: pure arithmetic, without torch.

The world is pipeline x data x context x tensor ranks; tensor varies fastest, pipeline slowest. A pipeline stage is a
run of consecutive ranks. The FFN experts of a stage's layers are spread over all kinds of its ranks alike: an
expert-parallel (EP) group is ``expert`` consecutive ranks of a stage, and the ranks that hold the same experts form an
expert-data-parallel (EDP) group.

8 ranks, pipeline 2, tensor 2, expert 2:

    stage {0 1 2 3} {4 5 6 7}     pp {0 4} {1 5} {2 6} {3 7}
    tp    {0 1} {2 3} {4 5} {6 7} dp {0 2} {1 3} {4 6} {5 7}
    ep    {0 1} {2 3} {4 5} {6 7} edp {0 2} {1 3} {4 6} {5 7}
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

from moepp.config import ParallelConfig
from moepp.errors import ConfigError

KINDS = ("stage", "pp", "dp", "cp", "tp", "dpcp", "replica", "ep", "edp")


class Coordinates(NamedTuple):
    """A rank's place along each axis of the world."""

    pipeline: int
    data: int
    context: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """How ``world_size`` ranks share the work.

    Kinds of groups (each kind covers every rank exactly once):

    - ``stage``: ranks that hold the same layers, in parts or whole; ``pp``: one rank of each stage, first stage first.
    - ``dp``: ranks with the same part of a sequence and of the attention weights, and other sequences.
    - ``tp``: ranks that share attention heads; ``cp``: ranks that share a sequence; ``replica``: both, the ranks that
      share a micro-batch's tokens.
    - ``dpcp``: ranks of a stage with the same part of the attention weights.
    - ``ep``: ranks that share one set of FFN experts; ``edp``: ranks that hold the same FFN experts.

    Attributes:
        world_size: all ranks.
        pipeline: stages, not counting that a rank may hold several chunks.
        context: ranks that share a sequence.
        tensor: ranks that share the attention heads.
        expert: ranks that share one set of FFN experts.

    Raises:
        ConfigError: the sizes do not divide the number of ranks.
    """

    world_size: int
    pipeline: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        shared = self.pipeline * self.context * self.tensor
        if self.world_size % shared:
            raise ConfigError(
                f"parallel.pipeline={self.pipeline} x parallel.context={self.context} x parallel.tensor={self.tensor} "
                f"= {shared} does not divide the {self.world_size} processes; change one of them"
            )
        if self.stage_size % self.expert:
            raise ConfigError(
                f"parallel.expert={self.expert} does not divide the {self.stage_size} processes"
                f"{' of a pipeline stage' if self.pipeline > 1 else ''}; change one of them"
            )

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> Layout:
        """Return the layout that a configuration asks for."""
        return cls(world_size, parallel.pipeline, parallel.context, parallel.tensor, parallel.expert)

    @property
    def stage_size(self) -> int:
        return self.world_size // self.pipeline

    @property
    def replica_size(self) -> int:
        """Ranks of a stage that share a micro-batch's tokens."""
        return self.context * self.tensor

    @property
    def data(self) -> int:
        """Replicas: how many different micro-batches are in work at a time."""
        return self.stage_size // self.replica_size

    def coordinates(self, rank: int) -> Coordinates:
        """Place of a rank."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        return Coordinates(*divmod(rest, self.data), context, tensor)

    def rank_at(self, place: Coordinates) -> int:
        """Return the rank at a place, the inverse of :meth:`coordinates`."""
        return ((place.pipeline * self.data + place.data) * self.context + place.context) * self.tensor + place.tensor

    def peers(self, kind: str, rank: int) -> list[int]:
        """Return the ranks of this rank's group of a kind, in ascending order, itself among them."""
        place = self.coordinates(rank)
        start = place.pipeline * self.stage_size
        if kind == "ep":
            first = start + (rank - start) // self.expert * self.expert
            return list(range(first, first + self.expert))
        if kind == "edp":
            return list(range(start + rank % self.expert, start + self.stage_size, self.expert))
        if kind not in _AXES:
            raise ValueError(f"{kind!r} is not a kind of group; use one of {', '.join(KINDS)}")
        sizes = Coordinates(self.pipeline, self.data, self.context, self.tensor)
        ranges = [
            range(size) if axis in _AXES[kind] else range(own, own + 1)
            for axis, own, size in zip(Coordinates._fields, place, sizes, strict=True)
        ]
        return [self.rank_at(Coordinates(*place)) for place in itertools.product(*ranges)]

    def partition(self, kind: str) -> list[list[int]]:
        """Return all groups of a kind, ordered by their first rank."""
        groups: list[list[int]] = []
        seen: set[int] = set()
        for rank in range(self.world_size):
            if rank not in seen:
                groups.append(self.peers(kind, rank))
                seen.update(groups[-1])
        return groups

    def stages_of(self, rank: int, chunks: int = 1) -> list[int]:
        """Return the stages whose layers a rank holds, when each holds ``chunks`` of ``pipeline * chunks`` in turn."""
        own = self.coordinates(rank).pipeline
        return [chunk * self.pipeline + own for chunk in range(chunks)]


# Along which axes the ranks of a group differ.
_AXES = {
    "stage": ("data", "context", "tensor"),
    "pp": ("pipeline",),
    "dp": ("data",),
    "cp": ("context",),
    "tp": ("tensor",),
    "dpcp": ("data", "context"),
    "replica": ("context", "tensor"),
}

"""How the FFN experts of all layers are spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

from moepp.distributed import comm


@dataclass(frozen=True)
class ExpertParallel:
    """One object for the whole model.

    Attributes:
        group: ranks that share the FFN experts; ``None``: every rank holds all of them.
        balance_group: ranks whose choices f_i counts when ``balance_loss_scope`` is not ``micro_batch`` (``None``: the
            default process group).
        stats: counts the bytes that are sent.
        num_chunks: chunks of the all-to-all; one is computed while the next is in flight.
    """

    group: comm.Group | None = None
    balance_group: comm.Group | None = None
    stats: comm.CommStats = field(default_factory=comm.CommStats)
    num_chunks: int = 1

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return 1 if self.group is None else comm.size(self.group)

"""Memory that does not suffice is one line with what to lower, not a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moepp.errors import TrainingError, is_out_of_memory
from moepp.io.untrusted import printable


@contextmanager
def enough_memory(work: str, rank: int, remedy: str) -> Iterator[None]:
    """Turn an allocation that fails within it into one line.

    Args:
        work: what the memory was for.
        rank: this rank.
        remedy: what to do.

    Raises:
        TrainingError: said by this rank: others may have enough.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = printable(error, 120) or type(error).__name__
        failed = TrainingError(
            f"out of memory in {work} on rank {rank} ({reason}); {remedy}, then start the same command again: it "
            "continues from the newest checkpoint"
        )
        failed.said_here = True
        raise failed from error

"""Memory that does not suffice is one line with what to lower, not a traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from moepp.errors import MoeppError, TrainingError, is_out_of_memory
from moepp.io.untrusted import printable


@contextmanager
def explained_memory(explain: Callable[[str], MoeppError]) -> Iterator[None]:
    """Turn an allocation that fails within it into the error that ``explain`` makes of what torch said.

    Raises:
        MoeppError: said by this rank: others may have enough.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        explained = explain(printable(error, 120) or type(error).__name__)
        explained.said_here = True
        raise explained from error


def enough_memory(work: str, rank: int, remedy: str) -> AbstractContextManager[None]:
    """Turn an allocation that fails while training into one line.

    Args:
        work: what the memory was for.
        rank: this rank.
        remedy: what to do.

    Raises:
        TrainingError: within it, said by this rank.
    """
    return explained_memory(
        lambda reason: TrainingError(
            f"out of memory in {work} on rank {rank} ({reason}); {remedy}, then start the same command again: it "
            "continues from the newest checkpoint"
        )
    )

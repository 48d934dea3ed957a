"""Faults that the checks of two processes have to notice; for the tests of the script (tests/e2e/test_prove.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from moepp.distributed.sequence import SequenceParallel
from moepp.model import stage
from moepp.moe.dispatch import AllToAllDispatcher
from tests import parity
from tests.gpu import distributed
from tests.moe_cases import Case, Observed


@contextlib.contextmanager
def faults(*_: Any) -> Iterator[None]:
    """One for each way to split a model.

    Experts' outputs come back in another order, every part of a sequence is taken for its first, and router logits do
    not go from stage to stage.
    """
    send_back, positions = AllToAllDispatcher.send_back, SequenceParallel.context_positions

    def rolled(self: AllToAllDispatcher, rows: Any, chunk: Any) -> Any:
        return send_back(self, rows.roll(1, 0), chunk)

    def of_the_first(self: SequenceParallel, seq_len: int, rank: int | None = None, device: Any = None) -> Any:
        return positions(self, seq_len, 0, device)

    with (
        patch.object(AllToAllDispatcher, "send_back", rolled),
        patch.object(SequenceParallel, "context_positions", of_the_first),
        patch.object(stage, "logits_cross", lambda *_: False),
    ):
        yield


def run_cases_with_faults(rank: int, cases: list[Case], device: str) -> list[Observed]:
    """As check 7 has its workers do."""
    with faults():
        return distributed._run_cases(rank, cases, device)


def train_with_faults(rank: int, setting: parity.Setting, layout: parity.Layout) -> parity.History:
    """As checks 7 and 15 have their workers do; one process has no part in the faults."""
    return parity.train(rank, setting, layout, faults if layout.ranks > 1 else None)

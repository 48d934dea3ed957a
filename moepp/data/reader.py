"""The next step's batches are read while the present step is trained."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from moepp.config import RunPlan
from moepp.distributed.device import lock_pages, use_in_thread

Batch = tuple[Tensor, Tensor]
"""Inputs and labels of one micro-batch, int64 [B, S]."""


class TrainBatches(Protocol):
    """Batches of this rank as a pure function of seed and step."""

    def train_batch(self, step: int, micro_step: int) -> Batch: ...


class BatchReader:
    """Global batches of this rank in host memory, one read ahead in a thread.

    The batches are those that ``data`` gives, whatever was read ahead: a step that was not foreseen, after a rewind
    say, is read when it is asked for. Pages are locked where there is an accelerator, so that copies to it can run
    beside other work.
    """

    def __init__(self, data: TrainBatches, plan: RunPlan, device: torch.device) -> None:
        self._data = data
        self._plan = plan
        self._device = device
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def read(self, step: int, has_next: bool = True) -> list[Batch]:
        """Micro-batches of ``step``; with ``has_next``, those of the step after it are read from now on.

        Raises:
            MoeppError, OSError: what reading this step raised, whether it was read now or ahead.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "batches", use_in_thread, (self._device,))
        foreseen, future = self._ahead if self._ahead is not None else (None, None)
        self._ahead = None
        if future is None or foreseen != step:
            future = self._thread.submit(self._read, step)  # one thread: never two readers of a dataset at once
        batches = future.result()
        if has_next and step + 1 < self._plan.train_batches:
            self._ahead = step + 1, self._thread.submit(self._read, step + 1)
        return batches

    def close(self) -> None:
        """Wait until the thread has ended; what it has read ahead is dropped."""
        self._ahead = None
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None

    def _read(self, step: int) -> list[Batch]:
        batches = [self._data.train_batch(step, micro_step) for micro_step in range(self._plan.accumulation_steps)]
        return [(lock_pages(ids, self._device), lock_pages(labels, self._device)) for ids, labels in batches]

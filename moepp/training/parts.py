"""What a run is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from moepp.checkpoint import Checkpointer
from moepp.config import Config, RunPlan
from moepp.data import Corpora
from moepp.distributed import comm
from moepp.distributed.groups import ParallelGroups
from moepp.engine.engine import Engine
from moepp.metrics.sinks import SinkGroup
from moepp.metrics.throughput import Throughput
from moepp.model.transformer import Transformer


class Data(Protocol):
    """Batches of this rank as a pure function of seed and index."""

    def train_batch(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]: ...

    def eval_batch(self, index: int, micro_step: int, name: str | None = None) -> tuple[Tensor, Tensor]: ...

    def epochs(self, batches: int) -> float:
        """Return how often the training data were read after so many global batches."""
        ...


Evaluation = Callable[[Transformer, "int | None", Callable[[], bool]], Mapping[str, float]]
"""Benchmarks of a model, given also the id that ends its documents (None: not known) and whether this rank must stop:
values by metric; collective."""


@dataclass(frozen=True)
class Parts:
    """What :class:`moepp.training.trainer.Trainer` needs; made by :mod:`moepp.training.build`."""

    cfg: Config
    plan: RunPlan
    groups: ParallelGroups
    model: Transformer
    engine: Engine
    corpora: Corpora
    data: Data
    comm_stats: comm.CommStats
    sinks: SinkGroup
    throughput: Throughput
    checkpointer: Checkpointer
    versions: dict[str, Any]
    evaluate_tasks: Evaluation | None = None  # of eval.tasks; None: there are none

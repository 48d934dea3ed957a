"""What is measured while a run trains, and the records that are made of it: one collective for each."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from moepp.distributed import comm
from moepp.engine.engine import Watch
from moepp.metrics.memory import host_memory_values, memory_values
from moepp.metrics.norms import ModuleNorms
from moepp.metrics.routing import RoutingTable
from moepp.metrics.stage_times import stage_metrics, stage_values
from moepp.metrics.step_stats import StepStats
from moepp.metrics.values import Value, reduce_values
from moepp.model.accounting import flops_per_token
from moepp.training.guards import LossWatch
from moepp.training.parts import Parts

logger = logging.getLogger(__name__)


class Recorder:
    """Measures every step a little and those that are logged closely; every rank has one.

    Args:
        parts: of the run.

    Attributes:
        stats: losses and routing since the last record; a checkpoint keeps them.
        clock: measures the stages of a step.
    """

    def __init__(self, parts: Parts) -> None:
        cfg = parts.cfg
        self._parts = parts
        self.clock = parts.comm_stats.clock
        self.stats = StepStats(cfg.model.moe_layers, cfg.model.moe, parts.model.moe_rows)
        self._norms = ModuleNorms(cfg.model.num_layers, parts.groups.device)
        self._loss_watch = LossWatch(cfg.model.vocab_size, cfg.optim.lr)
        self._flops = flops_per_token(cfg.model, cfg.data.seq_len, ffn_per_token=1.0)
        self._sent: Counter[str] = Counter()  # bytes by kind since the last record
        self._sent_rows = 0  # bytes of the present step
        self._steps = 0  # since the last record
        self._watch: Watch | None = None

    def is_logged(self, step: int) -> bool:
        """Return whether a record follows optimizer step ``step`` (from 1)."""
        train = self._parts.cfg.train
        return step == train.steps or step % train.log_interval == 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Measure the step that is taken within it."""
        stats = self._parts.comm_stats
        rows_before, sent_before = stats.row_bytes, stats.by_kind()
        self._watch = self._norms.watch if self.is_logged(number) else None
        with self.clock.step():
            yield
        self._sent_rows = stats.row_bytes - rows_before
        self._sent.update(stats.by_kind() - sent_before)
        self._steps += 1
        self._parts.throughput.add(self._parts.plan.tokens_per_step)

    @contextmanager
    def observation(self) -> Iterator[None]:
        """Look closely at the routers within it, if the present step is logged: its forward and backward passes.

        Not at passes that only count choices, whose statistics nobody takes.
        """
        if self._watch is None:
            yield
            return
        self._parts.model.set_observed(True)
        try:
            yield
        finally:
            self._parts.model.set_observed(False)

    @property
    def watch(self) -> Watch | None:
        """What looks at the gradients of the present step, for :meth:`moepp.engine.engine.Engine.step`."""
        return self._watch

    def commit(self) -> None:
        """Count the routing of the step, which was taken."""
        self.stats.commit(self._sent_rows)

    def log(self, measured: Mapping[str, float], step: int, tokens: int) -> None:
        """Reduce what was measured since the last record, and write one; collective.

        Args:
            measured: what the trainer adds to it, the same on every rank.
            step: optimizer steps taken.
            tokens: trained on so far.
        """
        parts = self._parts
        groups, logging_cfg = parts.groups, parts.cfg.logging
        values = self.stats.values() | stage_values(self.clock) | self._sent_values() | self._norms.values()
        values |= memory_values(groups.device) | host_memory_values()
        reduced = reduce_values(values, self._sum, groups.rank, groups.world_size)
        is_detailed = logging_cfg.routing == "detailed"
        table = self.stats.routing(reduced)
        record = {name: float(value) for name, value in reduced.items() if "/" in name}
        record = {name: value for name, value in record.items() if value or name not in self._sent_kinds}
        record |= self._routing_summary(table)
        record |= stage_metrics(reduced) | self._norms.metrics(reduced, is_detailed) | dict(measured)
        record |= self._throughput(record)
        if table is not None and is_detailed:
            record |= table.keys_per_layer()
        parts.sinks.log(record, step, tokens)
        if table is not None and self._is_kept(step):
            parts.sinks.log_routing(table.snapshot(step, tokens))
        self._remark(record, step)

    def _routing_summary(self, table: RoutingTable | None) -> dict[str, float]:
        """Return what the layers did; nothing where no step counted, for then it is not known."""
        if table is not None:
            return table.summary()
        has_layers = bool(self._parts.cfg.model.moe_layers)
        return {} if has_layers else {"comm/dispatch_bytes": 0.0, "comm/dispatch_bytes_vanilla": 0.0}

    def _throughput(self, record: Mapping[str, float]) -> dict[str, float]:
        layers = len(self._parts.cfg.model.moe_layers)
        ffn_per_token = record.get("routing/ffn_per_token") if layers else 0.0
        if ffn_per_token is None:  # no step counted: what the experts cost is not known
            return self._parts.throughput.read(None)
        flops = replace(self._flops, ffn_experts=ffn_per_token * self._flops.ffn_experts)
        found = self._parts.throughput.read(flops.forward_backward)
        assignments = found["throughput/tokens_per_second"] * ffn_per_token * layers
        return found | {"throughput/ffn_assignments_per_second": assignments}

    def _is_kept(self, step: int) -> bool:
        """Return whether the record after ``step`` is the first one at or behind a multiple of the interval."""
        cfg = self._parts.cfg
        interval, every = cfg.logging.routing_interval, cfg.train.log_interval
        before = (step - 1) // every * every
        return interval > 0 and (step == cfg.train.steps or step // interval > before // interval)

    @property
    def _sent_kinds(self) -> list[str]:
        return sorted(self._parts.comm_stats.by_kind())

    def _sent_values(self) -> dict[str, Value]:
        """Return bytes per step by kind; kinds that the layout does not have are zero, and not logged."""
        sent, steps, self._sent, self._steps = self._sent, max(self._steps, 1), Counter(), 0
        return {kind: Value.sum(torch.tensor(sent[kind] / steps, dtype=torch.float64)) for kind in self._sent_kinds}

    def _remark(self, record: Mapping[str, float], step: int) -> None:
        if self._parts.groups.rank == 0 and "train/loss" in record:
            is_last = step == self._parts.cfg.train.steps
            if remark := self._loss_watch.remark(record["train/loss"], step, is_last):
                logger.warning(remark)

    def _sum(self, tensor: Tensor) -> Tensor:
        return comm.all_reduce_sum(tensor, self._parts.groups.world)

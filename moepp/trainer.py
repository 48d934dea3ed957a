"""The training loop: batches in, optimizer steps and metric records out.

Shapes: B sequences of this rank's micro-batch, S tokens each, L MoE layers, E experts of every kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moepp import comm
from moepp.config import Config, accumulation_steps
from moepp.engine.engine import Engine, StepResult
from moepp.engine.schedule import learning_rate
from moepp.metrics.sinks import SinkGroup
from moepp.metrics.step_stats import StepStats
from moepp.metrics.throughput import Throughput
from moepp.model.accounting import flops_per_token
from moepp.model.transformer import LossOutput, Transformer
from moepp.parallel.groups import ParallelGroups


class Data(Protocol):
    """Batches of this rank as a pure function of seed and step."""

    def train_batch(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]: ...

    def eval_batch(self, index: int, micro_step: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Parts:
    """What a run is made of; see :mod:`moepp.build`."""

    cfg: Config
    groups: ParallelGroups
    model: Transformer
    engine: Engine
    data: Data
    traffic: comm.Traffic
    sinks: SinkGroup
    throughput: Throughput


class Trainer:
    """Runs optimizer steps from ``start_step`` to ``cfg.train.steps``."""

    def __init__(self, parts: Parts, start_step: int = 0) -> None:
        self.cfg = parts.cfg
        self.groups = parts.groups
        self.model = parts.model
        self.engine = parts.engine
        self.data = parts.data
        self.traffic = parts.traffic
        self.sinks = parts.sinks
        self.throughput = parts.throughput
        self.step = start_step  # optimizer steps done
        self.accumulation_steps = accumulation_steps(parts.cfg, parts.groups.world_size)
        moe = parts.cfg.model.moe
        self.stats = StepStats(parts.cfg.model.moe_layers, moe.num_ffn_experts, moe.top_k)

    @property
    def tokens_per_step(self) -> int:
        return self.cfg.train.global_batch_size * self.cfg.data.seq_len

    @property
    def tokens(self) -> int:
        """Training tokens seen so far, over all ranks."""
        return self.step * self.tokens_per_step

    def fit(self) -> None:
        """Train to the last step, evaluating and logging on the way."""
        train = self.cfg.train
        self.model.train()
        while self.step < train.steps:
            result = self.train_step()
            is_last = self.step == train.steps
            if self.step % train.log_interval == 0 or is_last:
                self.log(result)
            if is_last or (train.eval_interval and self.step % train.eval_interval == 0):
                self.evaluate_and_log()

    def train_step(self) -> StepResult:
        """One optimizer step over the global batch."""
        sent_before = self.traffic.row_bytes
        batches = [self._to_device(self.data.train_batch(self.step, a)) for a in range(self.accumulation_steps)]
        share_LE = self._global_selection_share(batches)
        for input_ids_BS, labels_BS in batches:
            out = self.model.loss(input_ids_BS, labels_BS, share_LE)
            self.stats.add_micro_batch(out.stats, out.ce_sum, out.num_tokens)
            # Every micro-batch of every rank has the same number of tokens, so a mean of means is the global mean.
            self.engine.backward(out.ce_sum / out.num_tokens + out.aux_loss)
        result = self.engine.step(self._learning_rate())
        self.step += 1
        self.stats.commit(self.traffic.row_bytes - sent_before)
        self.throughput.add(self.tokens_per_step)
        return result

    def log(self, result: StepResult) -> None:
        """Reduce the interval's statistics over ranks and write one record."""
        record = self.stats.reduce(self._sum, self._max)
        record["train/grad_norm"] = result.grad_norm
        record["optim/lr"] = self._learning_rate(self.step - 1)
        flops = flops_per_token(self.cfg.model, self.cfg.data.seq_len, record.get("routing/ffn_per_token"))
        record |= self.throughput.read(flops.forward_backward)
        self.sinks.log(record, self.step, self.tokens)

    def evaluate_and_log(self) -> None:
        """Evaluate on held-out data if the configuration asks for it."""
        if self.cfg.train.eval_batches:
            self.sinks.log({"eval/loss": self.evaluate()}, self.step, self.tokens)

    def evaluate(self) -> float:
        """Mean cross-entropy in nats per token over ``train.eval_batches`` held-out global batches."""
        ce_and_tokens = torch.zeros(2, dtype=torch.float64, device=self.groups.device)
        with self._evaluation(), torch.no_grad():
            for index in range(self.cfg.train.eval_batches):
                for micro_step in range(self.accumulation_steps):
                    out: LossOutput = self.model.loss(*self._to_device(self.data.eval_batch(index, micro_step)))
                    ce_and_tokens += torch.stack((out.ce_sum, out.num_tokens)).to(ce_and_tokens)
        ce_sum, num_tokens = self._sum(ce_and_tokens).tolist()
        return ce_sum / num_tokens if num_tokens else math.nan

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Eval mode (dropless routing), outside the measured training time."""
        self.model.eval()
        try:
            with self.throughput.paused():
                yield
        finally:
            self.model.train()

    def _global_selection_share(self, batches: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        """f_i of each MoE layer over the whole global batch, [L, E]; ``None`` where the layers count it themselves.

        With several micro-batches the choices of the later ones are not known when the first is back-propagated, so
        they are counted in a forward pass of their own.
        """
        if self.cfg.model.moe.balance_loss_scope != "global_batch" or len(batches) == 1:
            return None
        if not self.cfg.model.moe.balance_loss_weight:
            return None
        counts_LE, num_tokens = torch.zeros((), device=self.groups.device, dtype=torch.float64), 0
        with torch.no_grad():
            for input_ids_BS, _ in batches:
                stats = self.model(input_ids_BS).stats
                counts_LE = counts_LE + torch.stack([layer.load_E for layer in stats])
                num_tokens += input_ids_BS.numel()
        return (self._sum(counts_LE) / (num_tokens * self.groups.world_size)).float()

    def _learning_rate(self, step: int | None = None) -> float:
        return learning_rate(self.step if step is None else step, self.cfg.train.steps, self.cfg.optim)

    def _to_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        device = self.groups.device
        return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)

    def _sum(self, tensor: Tensor) -> Tensor:
        return comm.all_reduce_sum(tensor, self.groups.world)

    def _max(self, tensor: Tensor) -> Tensor:
        return comm.all_reduce_max(tensor, self.groups.world)

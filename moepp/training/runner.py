"""How the micro-batches of a global batch go through the model: on the whole model in turn, or through a pipeline.

Shapes: B sequences of a micro-batch, S tokens each, L MoE layers of the model, E experts of every kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moepp.distributed.stage_clock import StageClock
from moepp.engine.engine import Engine
from moepp.metrics.step_stats import StepStats
from moepp.model.transformer import Transformer

Batch = tuple[Tensor, Tensor]
"""Inputs and labels of a micro-batch, int64 [B, S], on this rank's device."""


class Runner(Protocol):
    """Runs forwards and backwards; all of it is collective over the ranks of a pipeline and of a stage."""

    def train(self, batches: Sequence[Batch], selection_share_LE: Tensor | None, stats: StepStats) -> Tensor:
        """Run forward and backward of every micro-batch of a step; the gradients are left with the engine.

        Args:
            batches: the micro-batches of this rank's replica.
            selection_share_LE: f_i of every MoE layer where it was counted elsewhere.
            stats: gets the statistics of the layers that this rank holds.

        Returns:
            Cross-entropy and auxiliary losses of this rank, summed over micro-batches, [2] fp64.
        """
        ...

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Run forward alone; returns this rank's cross-entropy sum and the tokens that it covers, [2] fp64."""
        ...

    def count_choices(self, batches: Sequence[Batch]) -> Tensor:
        """Run forward alone; returns how often this rank's tokens chose each expert, [L, E] fp64.

        Rows of layers that another rank holds are zero.
        """
        ...


class WholeModelRunner:
    """One micro-batch after the other through a model that this rank holds from end to end."""

    def __init__(self, model: Transformer, engine: Engine, clock: StageClock | None = None) -> None:
        self._model = model
        self._engine = engine
        self._clock = clock if clock is not None else StageClock()

    def train(self, batches: Sequence[Batch], selection_share_LE: Tensor | None, stats: StepStats) -> Tensor:
        loss_sums = torch.zeros(2, dtype=torch.float64, device=batches[0][0].device)
        for input_ids_BS, labels_BS in batches:
            with self._clock.stage("forward"):
                out = self._model.loss(input_ids_BS, labels_BS, selection_share_LE)
                stats.add_micro_batch(out.stats, out.ce_sum, out.num_tokens)
                loss_sums += torch.stack((out.ce_sum.detach(), out.aux_loss.detach())).to(loss_sums)
                # Every micro-batch of every rank has the same number of tokens: a mean of means is the global mean.
                loss = out.ce_sum / out.num_tokens + out.aux_loss
            with self._clock.stage("backward"):
                self._engine.backward(loss)
        return loss_sums

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        outputs = (self._model.loss(*batch) for batch in batches)
        return _sum([torch.stack((out.ce_sum, out.num_tokens)) for out in outputs])

    @torch.no_grad()
    def count_choices(self, batches: Sequence[Batch]) -> Tensor:
        outputs = (self._model(input_ids_BS) for input_ids_BS, _ in batches)
        return _sum([torch.stack([layer.load_E for layer in out.stats]) for out in outputs])


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """Sum in fp64, one after the other."""
    return torch.stack([tensor.to(torch.float64) for tensor in tensors]).sum(dim=0)

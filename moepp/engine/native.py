"""The plain-torch engine: manual gradient reduction, fp32 masters. The oracle for the other engines."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moepp.config import OptimConfig
from moepp.distributed.groups import ParallelGroups
from moepp.distributed.parameters import group_parameters
from moepp.distributed.stage_clock import StageClock
from moepp.engine.engine import Fetch, StepResult, Watch, make_optimizer
from moepp.engine.gradients import BUCKET_ELEMENTS, FlatGroup, GradientReduction
from moepp.engine.norms import global_norm, squared_norms
from moepp.engine.zero import ShardedGroup, WeightGather


class NativeEngine:
    """Gradients are summed in fp32 over the ranks that hold the same parameters: a stage, or those of its experts.

    Args:
        model: on this rank's device, in its precision.
        groups: over which ranks.
        optim: of the optimizer.
        accumulation_steps: micro-batches for each :meth:`step`; sums begin where the last one's gradients have come.
        zero_stage: 0: every rank updates all that it holds; 1: see :mod:`moepp.engine.zero`.
        bucket_elements: gradients that are summed at a time.
        clock: measures reduction and optimizer.

    Attributes:
        loss_scale: what a micro-batch's mean loss is multiplied by before its backward; the same for every parameter:
            all micro-batches of all ranks that have tokens of their own.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ParallelGroups,
        optim: OptimConfig,
        accumulation_steps: int,
        zero_stage: int = 0,
        bucket_elements: int = BUCKET_ELEMENTS,
        clock: StageClock | None = None,
    ) -> None:
        self.model = model
        self._clock = clock if clock is not None else StageClock()
        self.loss_scale = 1.0 / (accumulation_steps * groups.stage_size)
        self._groups = groups
        self._optim = optim
        parts = group_parameters(model.named_parameters(), groups.tp_size > 1)
        kind = ShardedGroup if zero_stage == 1 else FlatGroup
        self._flat = [kind(part, part.placement.group(groups), bucket_elements) for part in parts]
        self._parts = [list(flat.own_parts()) for flat in self._flat]  # the same tensors in every step
        self._gather = WeightGather(model, [flat for flat in self._flat if isinstance(flat, ShardedGroup)])
        self._reduction = GradientReduction(self._flat, list(model.parameters()), accumulation_steps)
        self._optimizer = make_optimizer(
            [
                {"params": flat.masters, "weight_decay": optim.weight_decay if flat.group.decay else 0.0}
                for flat in self._flat
            ],
            optim,
        )

    def backward(self, loss: Tensor) -> None:
        (loss * self.loss_scale).backward()

    def begin_backward(self, layers: range) -> None:
        pass  # each gradient counts by itself, whenever it arrives

    def step(self, lr: float, update: bool = True, watch: Watch | None = None) -> StepResult:
        with self._clock.stage("reduction"):
            self._reduction.finish()
        with self._clock.stage("optimizer"):
            return self._update(lr, update, watch)

    def _update(self, lr: float, update: bool, watch: Watch | None) -> StepResult:
        self._gather.finish()  # what a forward did not come to
        device = self._groups.device
        squares = [squared_norms([part.gradient for part in parts], device) for parts in self._parts]
        if watch is not None:
            watch([part for parts in self._parts for part in parts], torch.cat(squares))
        sums = ((own.sum(), flat.copies) for own, flat in zip(squares, self._flat, strict=True))
        grad_norm = global_norm(sums, self._groups.world, device)
        skipped = not update or not math.isfinite(grad_norm)
        if not skipped:
            self._clip(grad_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            for flat in self._flat:
                flat.write_back()
            self._gather.start()
        for flat in self._flat:
            flat.clear_grad()
        return StepResult(grad_norm, skipped)

    def _clip(self, grad_norm: float) -> None:
        limit = self._optim.grad_clip
        if limit is not None and grad_norm > limit:
            for flat in self._flat:
                torch._foreach_mul_(flat.gradients, limit / (grad_norm + 1e-6))  # pyright: ignore[reportPrivateImportUsage]

    def read_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        self._gather.finish()
        for flat in self._flat:
            yield from flat.read_state(self._optimizer, self._optim)

    def write_state(self, fetch: Fetch) -> None:
        self._gather.finish()
        for flat in self._flat:
            flat.write_state(self._optimizer, self._optim, fetch)
            flat.write_back()
        self._gather.start()
        self._gather.finish()

"""The plain-torch engine: manual gradient reduction, fp32 masters. The oracle for the other engines."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moepp.config import OptimConfig
from moepp.distributed import comm
from moepp.distributed.groups import ParallelGroups
from moepp.distributed.parameters import group_parameters
from moepp.engine.engine import Fetch, StepResult, make_optimizer, read_plain_state, write_plain_state
from moepp.engine.gradients import BUCKET_ELEMENTS, FlatGroup, GradientReduction
from moepp.engine.norms import squared_norm


class NativeEngine:
    """Gradients are summed in fp32: dense parameters over all ranks, FFN experts over the ranks that hold them.

    Args:
        model: on this rank's device, in its precision.
        groups: over which ranks.
        optim: of the optimizer.
        accumulation_steps: calls of :meth:`backward` for each of :meth:`step`; with the last one the sums begin.
        bucket_elements: gradients that are summed at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ParallelGroups,
        optim: OptimConfig,
        accumulation_steps: int,
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:
        self.model = model
        self._groups = groups
        self._optim = optim
        # The same divisor for every parameter: all micro-batches of all ranks.
        self._loss_scale = 1.0 / (accumulation_steps * groups.world_size)
        is_fp32 = next(model.parameters()).dtype == torch.float32
        self._flat = [FlatGroup(group, is_fp32) for group in group_parameters(model.named_parameters())]
        reduced = [(flat, groups.edp if flat.group.expert else groups.world) for flat in self._flat]
        self._reduction = GradientReduction(reduced, list(model.parameters()), bucket_elements)
        self._accumulation_steps, self._num_backwards = accumulation_steps, 0
        self._optimizer = make_optimizer(
            [
                {"params": flat.masters, "weight_decay": optim.weight_decay if flat.group.decay else 0.0}
                for flat in self._flat
            ],
            optim,
        )

    def backward(self, loss: Tensor) -> None:
        self._num_backwards += 1
        assert self._num_backwards <= self._accumulation_steps, "gradients of this step are being summed already"
        self._reduction.expect(is_last=self._num_backwards == self._accumulation_steps)
        (loss * self._loss_scale).backward()

    def step(self, lr: float, update: bool = True) -> StepResult:
        self._reduction.finish()
        self._num_backwards = 0
        grad_norm = self._grad_norm()
        skipped = not update or not math.isfinite(grad_norm)
        if not skipped:
            self._clip(grad_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            for flat in self._flat:
                flat.write_back()
        for flat in self._flat:
            flat.clear_grad()
        return StepResult(grad_norm, skipped)

    def _grad_norm(self) -> float:
        """Global norm: dense gradients are equal on all ranks, expert gradients are summed over the EP group."""
        device = self._flat[0].grad.device
        squares = {kind: torch.zeros((), dtype=torch.float64, device=device) for kind in (False, True)}
        for flat in self._flat:
            squares[flat.group.expert] += squared_norm(flat.grad)
        comm.all_reduce_sum(squares[True], self._groups.ep)
        return float((squares[False] + squares[True]).sqrt())

    def _clip(self, grad_norm: float) -> None:
        limit = self._optim.grad_clip
        if limit is not None and grad_norm > limit:
            for flat in self._flat:
                flat.grad.mul_(limit / (grad_norm + 1e-6))

    def read_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield from read_plain_state(*self._names_and_masters(), self._optimizer, self._optim)

    def write_state(self, fetch: Fetch) -> None:
        write_plain_state(*self._names_and_masters(), self._optimizer, self._optim, fetch)
        for flat in self._flat:
            flat.write_back()

    def _names_and_masters(self) -> tuple[list[str], list[nn.Parameter]]:
        names = [name for flat in self._flat for name in flat.group.parameters]
        return names, [master for flat in self._flat for master in flat.masters]

"""The plain-torch engine: manual gradient reduction, fp32 masters. The oracle for the other engines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moepp import comm
from moepp.config import OptimConfig
from moepp.engine.engine import Fetch, StepResult, make_optimizer, read_plain_state, write_plain_state
from moepp.parallel.groups import ParallelGroups
from moepp.parallel.parameters import ParameterGroup, group_parameters


class _FlatGroup:
    """Parameters of one group with their gradients in one flat fp32 buffer, so that one collective reduces them."""

    def __init__(self, group: ParameterGroup, model_is_fp32: bool) -> None:
        self.group = group
        parameters = list(group.parameters.values())
        # In fp32 the parameters are their own masters; in bf16 the masters are fp32 copies.
        self.masters = parameters if model_is_fp32 else [nn.Parameter(p.detach().float()) for p in parameters]
        self.parameters = parameters
        self._accumulates_itself = model_is_fp32  # autograd does, into the views
        self._written = [False] * len(parameters)
        self.grad = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        self.grad_views: list[Tensor] = []
        offset = 0
        for index, (parameter, master) in enumerate(zip(parameters, self.masters, strict=True)):
            view = self.grad[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
            self.grad_views.append(view)
            master.grad = view
            if not model_is_fp32:
                parameter.register_post_accumulate_grad_hook(self._accumulate(index))

    def _accumulate(self, index: int) -> Any:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if self._written[index]:
                self.grad_views[index].add_(parameter.grad)
            else:  # a quarter of the time of zeroing and adding
                self.grad_views[index].copy_(parameter.grad)
                self._written[index] = True
            parameter.grad = None

        return hook

    def finish_grad(self) -> Tensor:
        """The gradient of all micro-batches, flat; zeros where no loss reached a parameter."""
        if not self._accumulates_itself:
            for view, written in zip(self.grad_views, self._written, strict=True):
                if not written:
                    view.zero_()
        return self.grad

    def clear_grad(self) -> None:
        """Forget it, for the next step."""
        self._written = [False] * len(self._written)
        if self._accumulates_itself:
            self.grad.zero_()

    def write_back(self) -> None:
        """Round the fp32 masters into the model's parameters."""
        if self.masters is not self.parameters:
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.data.copy_(master.data)


def _square(grad: Tensor) -> Tensor:
    """Sum of squares in float64, from float32 norms of parts: float64 throughout takes ten times as long."""
    norms = torch.stack([torch.linalg.vector_norm(part) for part in grad.split(2**22)])
    return norms.double().square().sum()


class NativeEngine:
    """Gradients are summed in fp32: dense parameters over all ranks, FFN experts over the ranks that hold them."""

    def __init__(
        self,
        model: nn.Module,
        groups: ParallelGroups,
        optim: OptimConfig,
        accumulation_steps: int,
    ) -> None:
        self.model = model
        self._groups = groups
        self._optim = optim
        # The same divisor for every parameter: all micro-batches of all ranks.
        self._loss_scale = 1.0 / (accumulation_steps * groups.world_size)
        is_fp32 = next(model.parameters()).dtype == torch.float32
        self._flat = [_FlatGroup(group, is_fp32) for group in group_parameters(model.named_parameters())]
        self._optimizer = make_optimizer(
            [
                {"params": flat.masters, "weight_decay": optim.weight_decay if flat.group.decay else 0.0}
                for flat in self._flat
            ],
            optim,
        )

    def backward(self, loss: Tensor) -> None:
        (loss * self._loss_scale).backward()

    def step(self, lr: float, update: bool = True) -> StepResult:
        for flat in self._flat:
            comm.all_reduce_sum(flat.finish_grad(), self._groups.edp if flat.group.expert else self._groups.world)
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
            squares[flat.group.expert] += _square(flat.grad)
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

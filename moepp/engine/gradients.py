"""Gradients of the native engine: fp32, flat, summed over ranks in buckets while backward goes on.

A bucket is a slice of a group's flat gradient. Once its parameters have the gradients of all micro-batches of the step,
its sum over ranks starts, whatever the order of the micro-batches. Buckets start in one order on every rank, whichever
becomes ready first: that of backward, those of the last layers first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moepp.config import OptimConfig
from moepp.distributed import comm
from moepp.distributed.parameters import ParameterGroup
from moepp.engine.buckets import Span, cut
from moepp.engine.engine import Fetch, OwnPart, read_plain_state, write_plain_state

BUCKET_ELEMENTS = 2**23  # 32 MB: long enough for a network's full bandwidth


class FlatGroup:
    """Parameters of one group with their gradients in one flat fp32 buffer; every rank updates all of them.

    Attributes:
        ranks: those that hold the same parameters; over them gradients are summed.
        masters: what the optimizer updates; in fp32 the parameters themselves, in bf16 fp32 copies.
        copies: ranks that hold the same :attr:`gradients` after the sum.
        arrived: called with a parameter's index as soon as a micro-batch's gradient has been added to ``grad``.
    """

    ALIGN: ClassVar[int] = 1

    def __init__(self, group: ParameterGroup, ranks: comm.Group, bucket_elements: int, shares: int = 1) -> None:
        self.group, self.ranks = group, ranks
        self.parameters = list(group.parameters.values())
        self.copies = comm.size(ranks)
        self.arrived: Callable[[int], None] | None = None
        self._accumulates_itself = self.parameters[0].dtype == torch.float32  # autograd does, into the views
        self._written = [False] * len(self.parameters)
        sizes = [parameter.numel() for parameter in self.parameters]
        self.starts, self.spans = cut(sizes, bucket_elements, self.ALIGN, shares)
        self.grad = torch.zeros(self.spans[-1].stop, device=self.parameters[0].device)
        self.grad_views: list[Tensor] = []
        for index, (parameter, start) in enumerate(zip(self.parameters, self.starts, strict=True)):
            view = self.grad[start : start + parameter.numel()].view_as(parameter)
            self.grad_views.append(view)
            if self._accumulates_itself:
                parameter.grad = view
            parameter.register_post_accumulate_grad_hook(self._accumulate(index))
        self.masters = self._make_masters()

    def _make_masters(self) -> list[nn.Parameter]:
        if self._accumulates_itself:
            return self.parameters
        masters = [nn.Parameter(parameter.detach().float()) for parameter in self.parameters]
        for master, view in zip(masters, self.grad_views, strict=True):
            master.grad = view
        return masters

    @property
    def gradients(self) -> list[Tensor]:
        """What this rank's optimizer uses of the flat gradient, once it is summed."""
        return [self.grad]

    def own_parts(self) -> Iterator[OwnPart]:
        """Yield what this rank's optimizer uses of each parameter."""
        for name, gradient, master in zip(self.group.parameters, self.grad_views, self.masters, strict=True):
            yield OwnPart(name, gradient, master, self.copies)

    def start_sum(self, span: Span) -> comm.Pending:
        """Sum a bucket over the ranks."""
        return comm.start_all_reduce_sum(self.grad[span.start : span.stop], self.ranks)

    def _accumulate(self, index: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if not self._accumulates_itself:
                self._add(parameter, index)
            if self.arrived is not None:
                self.arrived(index)

        return hook

    def _add(self, parameter: Tensor, index: int) -> None:
        assert parameter.grad is not None
        if self._written[index]:
            self.grad_views[index].add_(parameter.grad)
        else:  # a quarter of the time of zeroing and adding
            self.grad_views[index].copy_(parameter.grad)
            self._written[index] = True
        parameter.grad = None

    def fill_grad(self) -> None:
        """Zeros where no loss reached a parameter."""
        if not self._accumulates_itself:
            for view, written in zip(self.grad_views, self._written, strict=True):
                if not written:
                    view.zero_()

    def clear_grad(self) -> None:
        """Forget the gradient, for the next step."""
        self._written = [False] * len(self._written)
        if self._accumulates_itself:
            self.grad.zero_()

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the fp32 masters into the model's parameters."""
        if self.masters is not self.parameters:
            torch._foreach_copy_([p.data for p in self.parameters], [master.data for master in self.masters])  # pyright: ignore[reportPrivateImportUsage]

    def read_state(
        self, optimizer: torch.optim.Optimizer, optim: OptimConfig
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """As :meth:`moepp.engine.engine.StateSource.read_state`, for this group."""
        yield from read_plain_state(list(self.group.parameters), self.masters, optimizer, optim)

    def write_state(self, optimizer: torch.optim.Optimizer, optim: OptimConfig, fetch: Fetch) -> None:
        """As :meth:`moepp.engine.engine.Engine.write_state`, for this group."""
        write_plain_state(list(self.group.parameters), self.masters, optimizer, optim, fetch)


@dataclass
class _Bucket:
    flat: FlatGroup
    span: Span
    position: int  # of its first parameter in the model's order, the last one to get its gradient
    missing: int  # gradients of this step that have not come yet: one for each parameter and micro-batch


class GradientReduction:
    """Sums the flat gradients over ranks.

    Args:
        flats: the groups.
        order: the model's parameters in their order.
        accumulation_steps: gradients that every parameter gets in a step.
    """

    def __init__(self, flats: list[FlatGroup], order: list[nn.Parameter], accumulation_steps: int) -> None:
        self._flats, self._accumulation_steps = flats, accumulation_steps
        position = {id(parameter): index for index, parameter in enumerate(order)}
        buckets: list[_Bucket] = []
        for flat in flats:
            if comm.size(flat.ranks) == 1:
                continue
            of_parameter: list[_Bucket] = []
            for span in flat.spans:
                first = position[id(flat.parameters[span.first])]
                buckets.append(_Bucket(flat, span, first, span.size * accumulation_steps))
                of_parameter += [buckets[-1]] * span.size
            flat.arrived = self._on_arrival(of_parameter)
        self._buckets = sorted(buckets, key=lambda bucket: -bucket.position)
        self._started: list[comm.Pending] = []

    def _on_arrival(self, of_parameter: list[_Bucket]) -> Callable[[int], None]:
        def arrived(index: int) -> None:
            bucket = of_parameter[index]
            assert bucket.missing > 0, "gradients of this step are being summed already"
            bucket.missing -= 1
            if bucket.missing == 0:
                self._start_complete()

        return arrived

    def _start_complete(self) -> None:
        waiting = self._buckets[len(self._started) :]
        for bucket in waiting:
            if bucket.missing > 0:
                return
            self._started.append(bucket.flat.start_sum(bucket.span))

    def finish(self) -> None:
        """After the last backward: what has not started, a parameter without a gradient among it, and wait for all."""
        for flat in self._flats:
            flat.fill_grad()
        for bucket in self._buckets:
            bucket.missing = 0
        self._start_complete()
        for pending in self._started:
            pending.wait()
        self._started = []
        for bucket in self._buckets:
            bucket.missing = bucket.span.size * self._accumulation_steps

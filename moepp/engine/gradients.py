"""Gradients of the native engine: fp32, flat, summed over ranks in buckets while backward goes on.

A bucket is a slice of a group's flat gradient. Once its parameters have their gradients of the last micro-batch, its
all-reduce starts. Buckets start in one order on every rank, whatever becomes ready first: the order of
backward, the last layers first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moepp.distributed import comm
from moepp.distributed.parameters import ParameterGroup

BUCKET_ELEMENTS = 2**23  # 32 MB: long enough for a network's full bandwidth


class FlatGroup:
    """Parameters of one group with their gradients in one flat fp32 buffer.

    Attributes:
        masters: what the optimizer updates; in fp32 the parameters themselves, in bf16 fp32 copies.
        arrived: called with a parameter's index as soon as a micro-batch's gradient has been added to ``grad``.
    """

    def __init__(self, group: ParameterGroup, model_is_fp32: bool) -> None:
        self.group = group
        parameters = list(group.parameters.values())
        self.masters = parameters if model_is_fp32 else [nn.Parameter(p.detach().float()) for p in parameters]
        self.parameters = parameters
        self.arrived: Callable[[int], None] | None = None
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
            parameter.register_post_accumulate_grad_hook(self._accumulate(index))

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

    def write_back(self) -> None:
        """Round the fp32 masters into the model's parameters."""
        if self.masters is not self.parameters:
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.data.copy_(master.data)


@dataclass
class _Bucket:
    grad: Tensor
    group: comm.Group
    first: int  # its first parameter in the model's order, the last one to get its gradient
    size: int  # parameters
    missing: int = 0  # parameters without their gradient of the last micro-batch


class GradientReduction:
    """Sums the flat gradients over ranks.

    Args:
        flats: the groups and where each is reduced.
        order: the model's parameters in their order.
        bucket_elements: a bucket ends with the parameter that makes it so long.
    """

    def __init__(
        self,
        flats: list[tuple[FlatGroup, comm.Group]],
        order: list[nn.Parameter],
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:
        self._flats = [flat for flat, _ in flats]
        position = {id(parameter): index for index, parameter in enumerate(order)}
        buckets: list[_Bucket] = []
        for flat, group in flats:
            if comm.size(group) == 1:
                continue
            of_parameter = self._cut(flat, group, position, bucket_elements)
            buckets += {id(bucket): bucket for bucket in of_parameter}.values()
            flat.arrived = self._on_arrival(of_parameter)
        self._buckets = sorted(buckets, key=lambda bucket: -bucket.first)
        self._started: list[comm.PendingReduction] = []
        self._is_last = False

    @staticmethod
    def _cut(flat: FlatGroup, group: comm.Group, position: dict[int, int], bucket_elements: int) -> list[_Bucket]:
        """Return the bucket of each parameter, cut from the end, where backward begins."""
        of_parameter: list[_Bucket] = []
        end, stop, size = flat.grad.numel(), flat.grad.numel(), 0
        for parameter in reversed(flat.parameters):
            stop, size = stop - parameter.numel(), size + 1
            if end - stop >= bucket_elements or stop == 0:
                bucket = _Bucket(flat.grad[stop:end], group, position[id(parameter)], size)
                of_parameter += [bucket] * size
                end, size = stop, 0
        return of_parameter[::-1]

    def _on_arrival(self, of_parameter: list[_Bucket]) -> Callable[[int], None]:
        def arrived(index: int) -> None:
            if self._is_last:
                of_parameter[index].missing -= 1
                self._start_complete()

        return arrived

    def expect(self, is_last: bool) -> None:
        """Before each backward: whether it is the last of this step."""
        self._is_last = is_last
        for bucket in self._buckets:
            bucket.missing = bucket.size

    def _start_complete(self) -> None:
        waiting = self._buckets[len(self._started) :]
        for bucket in waiting:
            if bucket.missing > 0:
                return
            self._started.append(comm.start_all_reduce_sum(bucket.grad, bucket.group))

    def finish(self) -> None:
        """After the last backward: what has not started, a parameter without a gradient among it, and wait for all."""
        for flat in self._flats:
            flat.fill_grad()
        for bucket in self._buckets:
            bucket.missing = 0
        self._start_complete()
        for pending in self._started:
            pending.wait()
        self._started, self._is_last = [], False

"""ZeRO stage 1 in the native engine: every rank updates an equal share of each bucket.

Gradients are reduce-scattered where stage 0 all-reduces them, masters and optimizer state exist for the own share
alone, and the updated weights are all-gathered: those of layers while the next forward runs. With N parameters over P
ranks a rank holds, in bytes, weights 2 N (fp32: 4 N), gradients 4 N, masters 4 N / P (fp32: none, they are a part of
the weights) and AdamW's moments 8 N / P; a bucket's padding comes on top. The numbers are those of stage 0.

Source: Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from moepp.config import OptimConfig
from moepp.distributed import comm
from moepp.distributed.parameters import ParameterGroup
from moepp.engine.buckets import Span
from moepp.engine.engine import Fetch, OwnPart, optimizer_entry
from moepp.engine.gradients import FlatGroup


class ShardedGroup(FlatGroup):
    """As :class:`FlatGroup`, but this rank updates its share of every bucket alone.

    The model's parameters become views of flat weights, one tensor for each bucket, so that shares travel in place.
    """

    ALIGN: ClassVar[int] = 64  # elements: views start where vector loads and matrix products like it

    def __init__(self, group: ParameterGroup, ranks: comm.Group, bucket_elements: int) -> None:
        super().__init__(group, ranks, bucket_elements, shares=comm.size(ranks))
        self.copies = 1

    @torch.no_grad()
    def _make_masters(self) -> list[nn.Parameter]:
        self._weights = [self._flatten(span) for span in self.spans]
        self._own_weights = [comm.own_share(weight, self.ranks) for weight in self._weights]
        self._own_gradients = [comm.own_share(self.grad[span.start : span.stop], self.ranks) for span in self.spans]
        is_fp32 = self.parameters[0].dtype == torch.float32
        masters = [nn.Parameter(own if is_fp32 else own.float()) for own in self._own_weights]
        for master, gradient in zip(masters, self._own_gradients, strict=True):
            master.grad = gradient
        return masters

    def _flatten(self, span: Span) -> Tensor:
        """Return the flat weights of a bucket; its parameters become views of them."""
        flat = self.parameters[span.first].new_zeros(span.length)
        for parameter, place in self._places(span):
            view = flat[place].view_as(parameter)
            view.copy_(parameter)
            parameter.data = view
        return flat

    def _places(self, span: Span) -> Iterator[tuple[nn.Parameter, slice]]:
        """Yield the parameters of a bucket, and where in it they are."""
        for index in range(span.first, span.first + span.size):
            start = self.starts[index] - span.start
            yield self.parameters[index], slice(start, start + self.parameters[index].numel())

    @property
    def gradients(self) -> list[Tensor]:
        return self._own_gradients

    def own_parts(self) -> Iterator[OwnPart]:
        """Yield the part of each parameter in this rank's shares of the buckets; padding belongs to none."""
        names, rank = list(self.group.parameters), comm.rank(self.ranks)
        for master, gradient, span in zip(self.masters, self._own_gradients, self.spans, strict=True):
            first = rank * master.numel()
            for name, (_, place) in zip(names[span.first :], self._places(span), strict=False):
                start, stop = max(place.start - first, 0), min(place.stop - first, master.numel())
                if start < stop:
                    yield OwnPart(name, gradient[start:stop], master.detach()[start:stop], self.copies)

    def start_sum(self, span: Span) -> comm.Pending:
        return comm.start_reduce_scatter_sum(self.grad[span.start : span.stop], self.ranks)

    @torch.no_grad()
    def write_back(self) -> None:
        """Round this rank's masters into its share of the weights; :meth:`start_gather` tells the others."""
        if self.masters[0].dtype != self._own_weights[0].dtype:
            torch._foreach_copy_(self._own_weights, [master.data for master in self.masters])  # pyright: ignore[reportPrivateImportUsage]

    def start_gather(self, index: int) -> comm.Pending:
        """Take the other ranks' shares of the bucket's weights."""
        return comm.start_all_gather(self._weights[index], self.ranks)

    def read_state(
        self, optimizer: torch.optim.Optimizer, optim: OptimConfig
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield one bucket after the other is assembled (collective over :attr:`ranks`)."""
        names = list(self.group.parameters)
        for index, span in enumerate(self.spans):
            own = {"fp32": self.masters[index].detach()} | optimizer_entry(self.masters[index], optimizer, optim)
            step = {"step": own.pop("step")} if "step" in own else {}
            whole = {key: self._assemble(tensor) for key, tensor in own.items()}
            for name, (parameter, place) in zip(names[span.first :], self._places(span), strict=False):
                yield name, {key: flat[place].view_as(parameter) for key, flat in whole.items()} | step
            del whole  # before the next one

    def _assemble(self, own: Tensor) -> Tensor:
        whole = own.new_empty(own.numel() * comm.size(self.ranks))
        comm.own_share(whole, self.ranks).copy_(own)
        comm.start_all_gather(whole, self.ranks).wait()
        return whole

    @torch.no_grad()
    def write_state(self, optimizer: torch.optim.Optimizer, optim: OptimConfig, fetch: Fetch) -> None:
        """Read whole parameters, one at a time, and keep this rank's share."""
        names = list(self.group.parameters)
        for master, span in zip(self.masters, self.spans, strict=True):
            entry = optimizer_entry(master, optimizer, optim)
            step = {"step": entry.pop("step")} if "step" in entry else {}
            own = {"fp32": master.data} | entry
            share = range(comm.rank(self.ranks) * master.numel(), (comm.rank(self.ranks) + 1) * master.numel())
            for name, (parameter, place) in zip(names[span.first :], self._places(span), strict=False):
                whole = {key: torch.empty_like(parameter, dtype=torch.float32) for key in own}
                fetch(name, whole | step)
                start, stop = max(place.start, share.start), min(place.stop, share.stop)
                for key, target in own.items() if start < stop else ():
                    part = whole[key].flatten()[start - place.start : stop - place.start]
                    target[start - share.start : stop - share.start].copy_(part)


class WeightGather:
    """Brings updated weights to all ranks: those of each layer before its forward, all others at once.

    Args:
        model: its layers are the elements of its ``nn.ModuleList``.
        groups: whose weights.
    """

    def __init__(self, model: nn.Module, groups: list[ShardedGroup]) -> None:
        layers = [layer for child in model.children() if isinstance(child, nn.ModuleList) for layer in child]
        layer_of = {id(p): index for index, layer in enumerate(layers) for p in layer.parameters()}
        users: dict[tuple[int, int], set[int]] = {}  # (group, bucket) -> layers, -1: what is in none
        for number, group in enumerate(groups):
            for index, span in enumerate(group.spans):
                parameters = group.parameters[span.first : span.first + span.size]
                users[number, index] = {layer_of.get(id(parameter), -1) for parameter in parameters}
        self._groups = groups
        self._order = sorted(users, key=lambda bucket: (min(users[bucket]), bucket))
        self._pending: dict[tuple[int, int], comm.Pending] = {}
        self._at_once = [bucket for bucket in self._order if -1 in users[bucket]]
        for index, layer in enumerate(layers):
            if used := [bucket for bucket in self._order if index in users[bucket]]:
                layer.register_forward_pre_hook(lambda *_, used=used: self._wait(used))

    def start(self) -> None:
        """After an update: in the order in which the forward comes to them."""
        for number, index in self._order:
            self._pending[number, index] = self._groups[number].start_gather(index)
        self._wait(self._at_once)

    def finish(self) -> None:
        """Until every weight is there."""
        self._wait(list(self._pending))

    def _wait(self, buckets: Iterable[tuple[int, int]]) -> None:
        for bucket in buckets:
            pending = self._pending.pop(bucket, None)
            if pending is not None:
                pending.wait()

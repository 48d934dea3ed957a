"""One gradient buffer for an input that several operations read.

Autograd would let each of them fill a tensor of the input's size and then add these up, which on the CPU costs some per
cent of a layer's time, and on accelerators launches. Kernels add to what is there instead, in the pass that they make
anyway; torch's operations sum in float32 at least, by products that add, and round once.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepp.ops.backend import is_plain, kernels_for

_ATTRIBUTE = "_shared_gradient"


class SharedGradient:
    """The sum so far, of one backward pass: what an earlier one left behind, interrupted or partial, is forgotten.

    Args:
        dtype: of the sum.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._sum: tuple[int, Tensor] | None = None
        self._wide: tuple[int, Tensor] | None = None

    def take(self) -> Tensor | None:
        """Return the sum to add to; the caller puts the result back."""
        found, self._sum = self._sum, None
        return _of_this_pass(found)

    def put(self, gradient: Tensor) -> None:
        """Put the new sum back."""
        self._sum = (torch._C._current_graph_task_id(), gradient)

    def add(self, gradient_TD: Tensor, scale_T1: Tensor) -> None:
        """Add ``gradient * scale``."""
        sum_TD = self.take()
        if sum_TD is None:
            sum_TD = torch.mul(gradient_TD, scale_T1, out=torch.empty_like(gradient_TD, dtype=self.dtype))
        else:
            sum_TD.addcmul_(gradient_TD, scale_T1)
        self.put(sum_TD)

    def add_product(self, left_TP: Tensor, right_PD: Tensor) -> None:
        """Add ``left @ right``, factors of float32 at least."""
        sum_TD = self.take()
        if sum_TD is None:
            sum_TD = torch.mm(left_TP, right_PD).to(self.dtype)
        elif sum_TD.dtype == left_TP.dtype:
            torch.addmm(sum_TD, left_TP, right_PD, out=sum_TD)  # not addmm_, which counters of FLOPs do not know
        else:
            sum_TD.add_(torch.mm(left_TP, right_PD))
        self.put(sum_TD)

    def wide(self, x_TD: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the input in this dtype, one copy for all operations of the backward pass."""
        wide_TD = _of_this_pass(self._wide)
        if wide_TD is None or wide_TD.dtype != dtype:
            wide_TD = x_TD.to(dtype)
            self._wide = (torch._C._current_graph_task_id(), wide_TD)
        return wide_TD

    def close(self) -> Tensor | None:
        """Return the sum and keep nothing."""
        self._wide = None
        return self.take()

    def close_as(self, dtype: torch.dtype) -> Tensor | None:
        """As :meth:`close`, rounded to this dtype."""
        total_TD = self.close()
        return None if total_TD is None else total_TD.to(dtype)


def _of_this_pass(found: tuple[int, Tensor] | None) -> Tensor | None:
    return found[1] if found is not None and found[0] == torch._C._current_graph_task_id() else None


def share_gradient(x_TD: Tensor) -> Tensor:
    """Return ``x_TD`` with one gradient buffer shared by several operations; where useless, ``x_TD`` itself."""
    if torch.compiler.is_compiling() or not is_plain(x_TD) or not torch.is_grad_enabled() or not x_TD.requires_grad:
        return x_TD
    is_summed_by_kernels = kernels_for(x_TD) is not None
    shared = SharedGradient(x_TD.dtype if is_summed_by_kernels else torch.promote_types(x_TD.dtype, torch.float32))
    x_TD = _Share.apply(x_TD, shared)
    setattr(x_TD, _ATTRIBUTE, shared)
    return x_TD


def shared_gradient(x_TD: Tensor) -> SharedGradient | None:
    """Return the buffer of a tensor from :func:`share_gradient`, for an operation's forward to keep."""
    return getattr(x_TD, _ATTRIBUTE, None)


class _Share(torch.autograd.Function):
    """Comes last in backward: hands on what the operations summed, and what others may have added."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, shared: SharedGradient) -> Tensor:
        ctx.shared, ctx.dtype = shared, x_TD.dtype
        ctx.set_materialize_grads(False)
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor | None) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        total_TD = ctx.shared.close()
        if total_TD is None or grad_TD is None:
            return (grad_TD if total_TD is None else total_TD.to(ctx.dtype)), None
        return torch.add(total_TD, grad_TD, out=torch.empty_like(total_TD, dtype=ctx.dtype)), None

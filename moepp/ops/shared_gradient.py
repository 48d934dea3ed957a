"""One gradient buffer for an input that several operations read.

Autograd would let each of them fill a tensor of the input's size and then add these up, which on the CPU costs some per
cent of a layer's time. The kernels add to what is there instead, in the pass that they make anyway.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepp.ops.backend import row_kernels

_ATTRIBUTE = "_shared_gradient"


class SharedGradient:
    """The sum so far, of one backward pass: what an earlier one left behind, interrupted or partial, is forgotten."""

    def __init__(self) -> None:
        self._sum: tuple[int, Tensor] | None = None

    def take(self) -> Tensor | None:
        """Return the sum to add to; the caller puts the result back."""
        found, self._sum = self._sum, None
        return found[1] if found is not None and found[0] == torch._C._current_graph_task_id() else None

    def put(self, gradient: Tensor) -> None:
        """Put the new sum back."""
        self._sum = (torch._C._current_graph_task_id(), gradient)


def share_gradient(x_TD: Tensor) -> Tensor:
    """Return ``x_TD`` with one gradient buffer shared by several operations; where useless, ``x_TD`` itself."""
    if not row_kernels(x_TD) or not torch.is_grad_enabled() or not x_TD.requires_grad:
        return x_TD
    shared = SharedGradient()
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
        ctx.shared = shared
        ctx.set_materialize_grads(False)
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor | None) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        total_TD = ctx.shared.take()
        if total_TD is None or grad_TD is None:
            return (grad_TD if total_TD is None else total_TD), None
        return total_TD + grad_TD, None

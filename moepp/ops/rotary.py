"""Rotary position embeddings (RoPE, arXiv 2104.09864). Shapes: d head size, h = d/2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepp.ops.backend import kernels_for, uses_triton


def rotate(x_d: Tensor, cos_h: Tensor, sin_h: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of every head: [..., d] -> [..., d] in the same layout.

    Nothing of ``x_d`` is kept for backward, which rotates the other way. The angles, which broadcast against the
    halves of ``x_d``, get no gradient.
    """
    if torch.compiler.is_compiling():
        first_h, second_h = x_d.chunk(2, dim=-1)
        return torch.cat((first_h * cos_h - second_h * sin_h, second_h * cos_h + first_h * sin_h), dim=-1)
    return _Rotate.apply(x_d, cos_h, sin_h)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_d: Tensor, cos_h: Tensor, sin_h: Tensor) -> Tensor:
        ctx.save_for_backward(cos_h, sin_h)
        return _turn(x_d, cos_h, sin_h, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_d: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos_h, sin_h = ctx.saved_tensors
        return _turn(grad_d, cos_h, sin_h, -1), None, None


def _turn(x_d: Tensor, cos_h: Tensor, sin_h: Tensor, sign: int) -> Tensor:
    """One kernel of Triton's, or four passes over halves, which round twice."""
    out_d = torch.empty_like(x_d)
    kernels = kernels_for(x_d) if uses_triton() and x_d.dim() == 4 and x_d.stride(-1) == 1 else None
    if kernels is not None:
        kernels.call("rotate", x_d, cos_h, sin_h, out_d, sign)
        return out_d
    first_h, second_h = x_d.chunk(2, dim=-1)
    out_first_h, out_second_h = out_d.chunk(2, dim=-1)
    torch.mul(first_h, cos_h, out=out_first_h).addcmul_(second_h, sin_h, value=-sign)
    torch.mul(second_h, cos_h, out=out_second_h).addcmul_(first_h, sin_h, value=sign)
    return out_d

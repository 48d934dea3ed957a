"""torch's matrix products, in the precision in which the device has them.

oneDNN multiplies bfloat16 on CPUs from AVX-512 on. On others torch falls back to loops that take seven times as long as
float32's product, in backward a hundred times (measured with AVX2). There bfloat16 factors are multiplied in float32
and the result is rounded: the same sums, as bfloat16 products are summed in float32 anyway.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp import cpu


def multiplies_in_float32(tensor: Tensor) -> bool:
    """Whether products of tensors like this one are computed in float32 and rounded."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not _cpu_has_bfloat16()


@functools.cache
def _cpu_has_bfloat16() -> bool:
    kind = cpu.chosen()
    if kind is not None and not cpu.KINDS[kind].multiplies_bfloat16:
        return False  # whatever torch says: not every release looks at the variables
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def mm(left_MK: Tensor, right_KN: Tensor, out_MN: Tensor) -> None:
    """``out = left @ right``, without autograd."""
    if multiplies_in_float32(left_MK):
        out_MN.copy_(torch.mm(left_MK.float(), right_KN.float()))
    else:
        torch.mm(left_MK, right_KN, out=out_MN)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for [..., D] and [N, D]."""
    return _Float32Linear.apply(x, weight) if multiplies_in_float32(x) else F.linear(x, weight)


class _Float32Linear(torch.autograd.Function):
    """Keeps x and the weight for backward as they are, not their float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grad.float()
        wants_x, wants_weight = ctx.needs_input_grad
        grad_x = (grad @ weight.float()).to(x.dtype) if wants_x else None
        if not wants_weight:
            return grad_x, None
        return grad_x, (grad.flatten(0, -2).t() @ x.float().flatten(0, -2)).to(weight.dtype)

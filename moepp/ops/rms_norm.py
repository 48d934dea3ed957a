"""Root-mean-square layer normalisation (arXiv 1910.07467). Shapes: D width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``weight * (x / sqrt(mean(x^2) + eps))``: [..., D] -> [..., D], in x's dtype.

    On the CPU the quotient is computed in fp32, rounded to the dtype of ``x`` and then weighted, as Llama's code does.
    Elsewhere torch's fused kernel rounds once, after the weight. Backward keeps ``x`` and one number per row.
    """
    if _is_fused(x_D):
        return F.rms_norm(x_D, weight_D.shape, weight_D.to(x_D.dtype), eps)
    return _RMSNorm.apply(x_D, weight_D, eps)


def _is_fused(x_D: Tensor) -> bool:
    return x_D.device.type != "cpu" or torch.compiler.is_compiling()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide_D = x_D.to(torch.promote_types(x_D.dtype, torch.float32))
        inverse_1 = wide_D.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x_D, weight_D, inverse_1)
        return weight_D * (wide_D * inverse_1).to(x_D.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_D: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_D, weight_D, inverse_1 = ctx.saved_tensors
        normed_D = x_D.to(inverse_1.dtype) * inverse_1
        grad_x_D = grad_weight_D = None
        if ctx.needs_input_grad[1]:
            grad_weight_D = (grad_D * normed_D.to(x_D.dtype)).flatten(0, -2).sum(dim=0)
        if ctx.needs_input_grad[0]:
            grad_normed_D = (grad_D * weight_D).to(inverse_1.dtype)  # a new tensor
            along_1 = (grad_normed_D * normed_D).mean(dim=-1, keepdim=True)
            grad_x_D = grad_normed_D.addcmul_(normed_D, along_1, value=-1).mul_(inverse_1).to(x_D.dtype)
        return grad_x_D, grad_weight_D, None

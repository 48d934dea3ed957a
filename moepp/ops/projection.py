"""A wide input through a few outputs in float32: what a router does.

Shapes: T tokens, D width, P outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepp.ops.backend import cpu_kernels, require_cpu_kernels
from moepp.ops.matmul import linear_fp32, mm_fp32, multiplies_into_float32, without_autocast
from moepp.ops.shared_gradient import SharedGradient, shared_gradient


def project(x_TD: Tensor, weight_PD: Tensor) -> Tensor:
    """``x @ weight.T`` in float32 at least, whatever the dtypes and autocast; meant for few outputs."""
    if cpu_kernels(x_TD):
        return _Project.apply(x_TD.contiguous(), weight_PD.float().contiguous(), shared_gradient(x_TD))
    return _ProjectByTorch.apply(x_TD, weight_PD, shared_gradient(x_TD))


class _ProjectByTorch(torch.autograd.Function):
    """Keeps x for backward as it is, not its float32 copy."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_PD: Tensor, shared: SharedGradient | None) -> Tensor:
        ctx.shared = shared
        wide_PD = weight_PD.to(torch.promote_types(x_TD.dtype, torch.float32))
        ctx.save_for_backward(x_TD, wide_PD)
        ctx.weight_dtype = weight_PD.dtype
        if multiplies_into_float32(x_TD, weight_PD):
            with without_autocast(x_TD.device.type):
                return mm_fp32(x_TD, weight_PD.t())
        return linear_fp32(x_TD, wide_PD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TP: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, wide_PD = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        shared, grad_weight_PD = SharedGradient(grad_TP.dtype) if ctx.shared is None else ctx.shared, None
        with without_autocast(x_TD.device.type):
            if wants_weight:
                grad_weight_PD = torch.mm(grad_TP.t(), shared.wide(x_TD, grad_TP.dtype)).to(ctx.weight_dtype)
            if wants_x:
                shared.add_product(grad_TP, wide_PD)
        return (shared.close_as(x_TD.dtype) if ctx.shared is None else None), grad_weight_PD, None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_PD: Tensor, shared: SharedGradient | None) -> Tensor:
        ctx.shared = shared
        ctx.save_for_backward(x_TD, weight_PD)
        ctx.sizes, ctx.kernels = (*x_TD.shape, weight_PD.shape[0]), require_cpu_kernels(x_TD)
        out_TP = weight_PD.new_empty(x_TD.shape[0], weight_PD.shape[0])
        ctx.kernels.call("project", x_TD, weight_PD, out_TP, *ctx.sizes)
        return out_TP

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TP: Tensor) -> tuple[Tensor | None, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, weight_PD = ctx.saved_tensors
        grad_x_TD, grad_weight_PD = torch.empty_like(x_TD), torch.zeros_like(weight_PD)
        sum_TD = None if ctx.shared is None else ctx.shared.take()
        inputs = (x_TD, weight_PD, grad_TP.contiguous(), sum_TD)
        ctx.kernels.call("project_backward", *inputs, grad_x_TD, grad_weight_PD, *ctx.sizes)
        if ctx.shared is not None:
            ctx.shared.put(grad_x_TD)
        return (grad_x_TD if ctx.shared is None else None), grad_weight_PD, None

"""Constant and copy experts: affine functions of their tokens (MoE++, arXiv 2410.07348, Eqs. 4 and 5).

With gate weights g, 0 where an expert was not chosen or was dropped:

    y_t = (g_copy + Σ_j g_const_j α_j) x_t + Σ_j g_const_j (1 - α_j) v_j,   [α_j, 1 - α_j] = softmax(W_j x_t)

Shapes: T tokens, D width, K experts of a token, C constant experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepp.ops.backend import kernels_for, require_kernels_for
from moepp.ops.constants import blocks
from moepp.ops.matmul import mm_fp32, multiplies_into_float32, without_autocast
from moepp.ops.shared_gradient import SharedGradient, shared_gradient


def affine_experts(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, alpha_C2D: Tensor, value_CD: Tensor, experts: range
) -> Tensor:
    """Return the weighted sum of these experts' outputs: [T, D] in x's dtype; 0 for a token that chose none of them.

    Args:
        x_TD: the tokens.
        ids_TK: chosen experts of every kind, int64.
        weights_TK: their gate weights, at least fp32. One of exactly 0 may get no gradient.
        alpha_C2D: W of every constant expert.
        value_CD: v of every constant expert.
        experts: numbers of the constant experts (the first C) and of the copy experts (the others).
    """
    if weights_TK.dtype == torch.float32 and kernels_for(x_TD):
        # A softmax of two depends on the difference of its logits alone.
        difference_CD = alpha_C2D.float().diff(dim=1).squeeze(1).neg()
        return _AffineExperts.apply(x_TD, ids_TK, weights_TK, difference_CD, value_CD, experts, shared_gradient(x_TD))
    return _AffineByTorch.apply(x_TD, ids_TK, weights_TK, alpha_C2D, value_CD, experts, shared_gradient(x_TD))


class _AffineByTorch(torch.autograd.Function):
    """Keeps x as it is, not its float32 copy; the gradient is written out, in fewer launches than autograd's.

    Z = constant and copy experts, X = all experts up to the last one here and one place for the others. For an expert
    with gate g and α, ``beta`` is g (1 - α) and ``curve`` is g α (1 - α).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        alpha_C2D: Tensor,
        value_CD: Tensor,
        experts: range,
        shared: SharedGradient | None,
    ) -> Tensor:
        ctx.experts, ctx.shared, ctx.alpha_dtype = experts, shared, alpha_C2D.dtype
        places_TK = ids_TK.clamp(max=experts.stop)
        gates_TX = weights_TK.new_zeros(len(x_TD), experts.stop + 1).scatter_(1, places_TK, weights_TK)
        gates_TZ = gates_TX[:, experts.start : experts.stop]
        out_TD, diff_CD = torch.empty_like(x_TD), None
        alpha_TC = beta_TC = curve_TC = None
        with without_autocast(x_TD.device.type):
            if len(value_CD):
                gates_TC = gates_TZ[:, : len(value_CD)]
                alpha_TC, diff_CD = _alphas(x_TD, alpha_C2D, weights_TK.dtype)
                narrow_TC = x_TD.new_empty(alpha_TC.shape)
                beta_TC = torch.addcmul(gates_TC, gates_TC, alpha_TC, value=-1, out=narrow_TC)
                own_TC = gates_TC.mul_(alpha_TC)  # the gates' place: what is left of them scales x
                curve_TC = torch.addcmul(own_TC, own_TC, alpha_TC, value=-1)
            scale_T1 = gates_TZ.sum(1, keepdim=True)
            torch.mul(x_TD, scale_T1, out=out_TD)
            if beta_TC is not None:
                torch.addmm(out_TD, beta_TC, value_CD.to(x_TD.dtype), out=out_TD)
        ctx.save_for_backward(x_TD, places_TK, scale_T1, value_CD, diff_CD, alpha_TC, beta_TC, curve_TC)
        return out_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, places_TK, scale_T1, value_CD, diff_CD, alpha_TC, beta_TC, curve_TC = ctx.saved_tensors
        dtype, num_tokens = scale_T1.dtype, len(x_TD)
        shared = SharedGradient(dtype) if ctx.shared is None else ctx.shared
        grad_alpha_C2D = x_TD.new_empty(*value_CD.shape[:1], 2, x_TD.shape[1], dtype=ctx.alpha_dtype)
        grad_value_CD, grad_gates_TC = torch.empty_like(value_CD), scale_T1[:, :0]  # of no constant experts
        with without_autocast(x_TD.device.type):
            grad_scale_T1 = (grad_TD * x_TD).sum(1, keepdim=True, dtype=dtype)
            shared.add(grad_TD, scale_T1)
            if beta_TC is not None:
                grad_beta_TC = torch.mm(grad_TD, value_CD.to(grad_TD.dtype).t())
                slope_TC = grad_scale_T1 - grad_beta_TC  # by alpha, with a gate of 1
                grad_gates_TC = torch.addcmul(grad_beta_TC, alpha_TC, slope_TC)
                grad_logits_TC = slope_TC.mul_(curve_TC)
                shared.add_product(grad_logits_TC, diff_CD)
                grad_diff_C1D = torch.mm(grad_logits_TC.t(), shared.wide(x_TD, dtype)).unsqueeze(1)
                signs_21 = blocks((1, -1), (1, 1), x_TD, dtype).view(2, 1)
                torch.mul(grad_diff_C1D, signs_21, out=grad_alpha_C2D)
                grad_value_CD = torch.mm(beta_TC.t(), grad_TD).to(value_CD.dtype)
        zero_11 = blocks((0,), (1,), x_TD, dtype).view(1, 1)
        num_copies = len(ctx.experts) - len(value_CD)
        others = (zero_11.expand(num_tokens, ctx.experts.start), zero_11.expand(num_tokens, 1))
        copies_TZ = grad_scale_T1.expand(num_tokens, num_copies)
        grad_weights_TK = torch.cat([others[0], grad_gates_TC, copies_TZ, others[1]], dim=1).gather(1, places_TK)
        grad_x_TD = shared.close_as(x_TD.dtype) if ctx.shared is None else None
        return grad_x_TD, None, grad_weights_TK, grad_alpha_C2D, grad_value_CD, None, None


def _alphas(x_TD: Tensor, alpha_C2D: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return α of every token and constant expert, and the difference of the two rows of each W, [C, D].

    A softmax of two depends on the difference of its logits alone.
    """
    minus_11 = blocks((-1,), (1,), x_TD, dtype).view(1, 1)  # its dtype is the result's
    diff_CD = torch.addcmul(alpha_C2D[:, 0], alpha_C2D[:, 1], minus_11)
    if multiplies_into_float32(x_TD, alpha_C2D):
        logits_TC2 = mm_fp32(x_TD, alpha_C2D.flatten(0, 1).t()).view(len(x_TD), -1, 2)
        return (logits_TC2[..., 0] - logits_TC2[..., 1]).sigmoid_(), diff_CD
    return torch.mm(x_TD.to(dtype), diff_CD.t()).sigmoid_(), diff_CD


class _AffineExperts(torch.autograd.Function):
    """The kernels compute α only for tokens that chose the expert."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        difference_CD: Tensor,
        value_CD: Tensor,
        experts: range,
        shared: SharedGradient | None,
    ) -> Tensor:
        ctx.shared = shared
        inputs = (x_TD, ids_TK, weights_TK, difference_CD, value_CD.to(x_TD.dtype))
        inputs = tuple(tensor.contiguous() for tensor in inputs)
        ctx.value_dtype, ctx.kernels = value_CD.dtype, require_kernels_for(x_TD)
        ctx.sizes = (*x_TD.shape, ids_TK.shape[1], len(value_CD), experts.start, experts.stop)
        out_TD, alpha_TK = torch.empty_like(inputs[0]), torch.empty_like(inputs[2])
        ctx.kernels.call("affine_experts", *inputs, out_TD, alpha_TK, *ctx.sizes)
        ctx.save_for_backward(*inputs, alpha_TK)
        return out_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs = ctx.saved_tensors
        x_TD, _, weights_TK, difference_CD, value_CD, _ = inputs
        grad_difference_CD = torch.zeros_like(difference_CD)
        grad_value_CD = torch.zeros_like(value_CD, dtype=torch.float32)
        grad_weights_TK = torch.empty_like(weights_TK)
        sum_TD = None if ctx.shared is None else ctx.shared.take()
        grad_x_TD = torch.empty_like(x_TD) if sum_TD is None else sum_TD  # tokens without such an expert cost nothing
        results = (sum_TD, grad_x_TD, grad_weights_TK, grad_difference_CD, grad_value_CD)
        ctx.kernels.call("affine_experts_backward", grad_TD.contiguous(), *inputs, *results, *ctx.sizes)
        if ctx.shared is not None:
            ctx.shared.put(grad_x_TD)
            grad_x_TD = None
        return grad_x_TD, None, grad_weights_TK, grad_difference_CD, grad_value_CD.to(ctx.value_dtype), None, None

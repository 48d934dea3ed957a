"""From router logits to the chosen experts and their gate weights.

Shapes: T tokens, E experts of every kind, K experts of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepp.ops.backend import kernels_for, require_kernels_for, uses_triton

NORMALIZATIONS = ("none", "zero_masked", "topk_softmax")  # numbered as in cpu/routing.c
_MAX_TOP_K = 8  # of the compiled kernel, which scans K times


def softmax_gates(
    logits_TE: Tensor, top_k: int, zero_experts: range, normalization: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax, top-K and gate normalisation in the logits' precision.

    - ``zero_masked`` (MoE++, released code): softmax over all experts, top-K, the weights of zero experts set to 0
      and the K weights renormalised to sum to 1. A token whose K weights are all 0 keeps zeros.
    - ``none`` (MoE++, arXiv 2410.07348, Eq. 1): softmax over all experts, no renormalisation.
    - ``topk_softmax`` (Mixtral, arXiv 2401.04088): softmax over the K chosen logits.

    Args:
        logits_TE: at least fp32.
        top_k: K.
        zero_experts: which experts are zero experts.
        normalization: one of ``NORMALIZATIONS``.

    Returns:
        probabilities [T, E] and weights [T, K], differentiable, and the experts [T, K], best first, int64.
        The order is (probabilities, experts, weights).
    """
    is_last = zero_experts.stop == logits_TE.shape[1]
    fits = is_last and (top_k <= _MAX_TOP_K or uses_triton())
    if fits and logits_TE.dtype == torch.float32 and kernels_for(logits_TE):
        return _Gates.apply(logits_TE, top_k, zero_experts.start, NORMALIZATIONS.index(normalization))
    return _GatesByTorch.apply(logits_TE, top_k, zero_experts, normalization)


class _GatesByTorch(torch.autograd.Function):
    """The gradient is written out: a third of the launches that autograd makes of the forward's operations."""

    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, top_k: int, zero_experts: range, normalization: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        probs_TE = torch.softmax(logits_TE, dim=-1)
        ctx.normalization = normalization
        if normalization == "topk_softmax":
            chosen_TK, ids_TK = torch.topk(logits_TE, top_k, dim=-1)
            weights_TK = torch.softmax(chosen_TK, dim=-1)
        else:
            weights_TK, ids_TK = torch.topk(probs_TE, top_k, dim=-1)
        if normalization == "zero_masked":
            if len(zero_experts):
                is_zero_TK = ids_TK >= zero_experts.start
                if zero_experts.stop < logits_TE.shape[1]:
                    is_zero_TK &= ids_TK < zero_experts.stop
                weights_TK = weights_TK.masked_fill_(is_zero_TK, 0)
            total_T1 = weights_TK.sum(dim=-1, keepdim=True)
            # Only a token that chose zero experts alone sums to 0; dividing by 1 keeps its weights at 0 instead of NaN.
            total_T1 += total_T1 == 0
            weights_TK = weights_TK / total_T1
        return _kept(ctx, probs_TE, ids_TK, weights_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_probs_TE: Tensor | None, _: None, grad_weights_TK: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        probs_TE, ids_TK, weights_TK = ctx.saved_tensors
        if ctx.normalization == "none":
            if grad_weights_TK is not None:
                start_TE = torch.zeros_like(probs_TE) if grad_probs_TE is None else grad_probs_TE
                grad_probs_TE = start_TE.scatter_add(1, ids_TK, grad_weights_TK)
            return _softmax_backward(grad_probs_TE, probs_TE), None, None, None
        # Weights that sum to 1 are the softmax of their experts' logits; those of zero experts are 0, and stay so.
        grad_logits_TE = _softmax_backward(grad_probs_TE, probs_TE)
        if grad_weights_TK is not None:
            grad_logits_TE = torch.zeros_like(probs_TE) if grad_logits_TE is None else grad_logits_TE
            # A token's experts differ: nothing adds up in any order.
            grad_logits_TE.scatter_add_(1, ids_TK, _softmax_backward(grad_weights_TK, weights_TK))
        return grad_logits_TE, None, None, None


def _kept(ctx: Any, probs_TE: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a forward gives, after keeping it for its backward; a missing gradient stays None."""
    ctx.save_for_backward(probs_TE, ids_TK, weights_TK)
    ctx.mark_non_differentiable(ids_TK)
    ctx.set_materialize_grads(False)
    return probs_TE, ids_TK, weights_TK


def _softmax_backward(grad: Tensor | None, probs: Tensor) -> Any:
    return None if grad is None else torch.ops.aten._softmax_backward_data(grad, probs, -1, probs.dtype)


class _Gates(torch.autograd.Function):
    """By one kernel: among experts of equal probability the lower number is chosen."""

    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, top_k: int, first_zero: int, normalization: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = logits_TE.contiguous()
        num_tokens, num_experts = logits_TE.shape
        probs_TE, weights_TK = torch.empty_like(logits_TE), logits_TE.new_empty(num_tokens, top_k)
        ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits_TE.device)
        ctx.kernels, ctx.sizes = (
            require_kernels_for(logits_TE),
            (num_tokens, num_experts, top_k, first_zero, normalization),
        )
        ctx.kernels.call("gates", logits_TE, probs_TE, ids_TK, weights_TK, *ctx.sizes)
        return _kept(ctx, probs_TE, ids_TK, weights_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_probs_TE: Tensor | None, _: None, grad_weights_TK: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        probs_TE, ids_TK, weights_TK = ctx.saved_tensors
        grad_weights_TK = torch.zeros_like(weights_TK) if grad_weights_TK is None else grad_weights_TK.contiguous()
        grad_probs_TE = None if grad_probs_TE is None else grad_probs_TE.contiguous()
        grad_logits_TE = torch.empty_like(probs_TE)
        inputs = (probs_TE, ids_TK, weights_TK, grad_probs_TE, grad_weights_TK)
        ctx.kernels.call("gates_backward", *inputs, grad_logits_TE, *ctx.sizes)
        return grad_logits_TE, None, None, None

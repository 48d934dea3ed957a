"""From router logits to the chosen experts and their gate weights.

Shapes: T tokens, E experts of every kind, K experts of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepp.ops.backend import require_row_kernels, row_kernels, uses_triton

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
    if fits and logits_TE.dtype == torch.float32 and row_kernels(logits_TE):
        return _Gates.apply(logits_TE, top_k, zero_experts.start, NORMALIZATIONS.index(normalization))
    probs_TE = torch.softmax(logits_TE, dim=-1)
    scores_TE = logits_TE if normalization == "topk_softmax" else probs_TE
    topk_ids_TK = torch.topk(scores_TE, top_k, dim=-1).indices
    if normalization == "topk_softmax":
        return probs_TE, topk_ids_TK, torch.softmax(logits_TE.gather(1, topk_ids_TK), dim=-1)
    weights_TK = probs_TE.gather(1, topk_ids_TK)
    if normalization == "zero_masked":
        weights_TK = _mask_zero_experts(weights_TK, topk_ids_TK, zero_experts)
    return probs_TE, topk_ids_TK, weights_TK


def _mask_zero_experts(weights_TK: Tensor, topk_ids_TK: Tensor, zero_experts: range) -> Tensor:
    """Set the weights of zero experts to 0 and the others of each token to a sum of 1."""
    if len(zero_experts):
        is_zero_TK = (topk_ids_TK >= zero_experts.start) & (topk_ids_TK < zero_experts.stop)
        weights_TK = weights_TK.masked_fill(is_zero_TK, 0.0)
    total_T1 = weights_TK.sum(dim=-1, keepdim=True)
    # Only a token that chose zero experts alone sums to 0; dividing by 1 keeps its weights at 0 instead of NaN.
    return weights_TK / torch.where(total_T1 > 0, total_T1, 1.0)


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
            require_row_kernels(logits_TE),
            (num_tokens, num_experts, top_k, first_zero, normalization),
        )
        ctx.kernels.call("gates", logits_TE, probs_TE, ids_TK, weights_TK, *ctx.sizes)
        ctx.save_for_backward(probs_TE, ids_TK, weights_TK)
        ctx.mark_non_differentiable(ids_TK)
        ctx.set_materialize_grads(False)
        return probs_TE, ids_TK, weights_TK

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

"""Cross-entropy of a large vocabulary in chunks: [T, V] logits are never held.

Letters: T tokens, C tokens of one chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepp.ops.backend import kernels_for
from moepp.ops.matmul import (
    add_transposed_product,
    multiplies_in_float32,
    repacks_right_factor,
    without_autocast,
)

IGNORE_INDEX = -100
_MIN_CHUNKS = 4  # so that small batches do not hold all their logits either
_MIN_CHUNK_TOKENS = 256  # fewer would spend the time on adding up the weight's gradient
_MIN_CHUNK_TOKENS_REPACKED = 1024  # where each product of a chunk also copies the whole weight (measured)
_CHUNK_ELEMENTS_CPU = 2**21  # logits that stay in the cache; measured fastest with V = 8192
_CHUNK_ELEMENTS = 2**26  # 256 MiB of fp32 logits


def chunked_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of ``-log softmax(hidden weight^T)[label]`` over the labels that are not -100.

    Logits are computed in the dtype of the inputs, autocast or not (in fp32 where a CPU cannot multiply bf16), and
    log-softmax in fp32 (fp64 for fp64 inputs).
    Where gradients are wanted they are computed chunk by chunk already in forward, the one of ``weight_VD``
    accumulated in fp32, so that backward only scales them, in fp32.

    Args:
        hidden_TD: [T, D], after the final norm.
        weight_VD: [V, D], the output embedding.
        labels_T: [T], int64; the token to predict at each position, or -100.
        chunk_tokens: tokens per chunk; None: chosen from T and V.

    Returns:
        (loss_sum, num_tokens): 0-dim tensors, fp32 (fp64) and int64; the second counts the labels that are not -100.

    Raises:
        IndexError: a label is neither -100 nor below V. An accelerator is not waited for to find out: there such a
            label makes the loss and the gradient of ``hidden_TD`` NaN.
    """
    vocab_size = weight_VD.shape[0]
    if labels_T.device.type == "cpu" and _is_wrong(labels_T, vocab_size).any():
        raise IndexError(f"a label is neither {IGNORE_INDEX} nor in [0, {vocab_size})")
    if chunk_tokens is None:
        chunk_tokens = _default_chunk_tokens(hidden_TD, vocab_size)
    loss_sum = _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, labels_T, chunk_tokens, torch.is_grad_enabled())
    return loss_sum, (labels_T != IGNORE_INDEX).sum()


def _default_chunk_tokens(hidden_TD: Tensor, vocab_size: int) -> int:
    elements = _CHUNK_ELEMENTS_CPU if hidden_TD.device.type == "cpu" else _CHUNK_ELEMENTS
    least = _MIN_CHUNK_TOKENS_REPACKED if repacks_right_factor(hidden_TD) else _MIN_CHUNK_TOKENS
    return max(1, min(max(elements // vocab_size, least), -(-hidden_TD.shape[0] // _MIN_CHUNKS)))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_tokens: int, grad_enabled: bool
    ) -> Tensor:
        accumulate_dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        wants_hidden, wants_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        ctx.hidden_dtype, ctx.weight_dtype = hidden_TD.dtype, weight_VD.dtype
        if multiplies_in_float32(hidden_TD):  # then the logits need not be rounded either
            hidden_TD, weight_VD = hidden_TD.float(), weight_VD.float()
        # Ignored rows are blanked in the [T, D] factors, which spares a pass over [T, V].
        ignored_T = labels_T == IGNORE_INDEX
        hidden_TD = hidden_TD.masked_fill(ignored_T.unsqueeze(1), 0)
        # 1, but 0 where ignored and NaN where the label is out of range.
        factor_T = (~ignored_T).to(accumulate_dtype)
        factor_T.masked_fill_(_is_wrong(labels_T, weight_VD.shape[0]), float("nan"))
        # A Function's forward runs without autograd, but still under autocast: the products must keep their dtype.
        with without_autocast(hidden_TD.device.type):
            grad_hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=accumulate_dtype) if wants_weight else None
            losses_T = hidden_TD.new_empty(hidden_TD.shape[0], dtype=accumulate_dtype)
            for start in range(0, hidden_TD.shape[0], chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                logits_CV = hidden_TD[rows] @ weight_VD.T
                _loss_and_gradient(logits_CV, labels_T[rows], losses_T[rows], wants_hidden or wants_weight)
                if grad_hidden_TD is not None:
                    torch.mm(logits_CV, weight_VD, out=grad_hidden_TD[rows])
                if grad_weight_VD is not None:
                    add_transposed_product(grad_weight_VD, logits_CV, hidden_TD[rows])
        if grad_hidden_TD is not None:
            grad_hidden_TD *= factor_T.unsqueeze(1)
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        return losses_T.mul_(factor_T).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden_TD, grad_weight_VD = (
            None if gradient is None else _scale(gradient, grad_outputs[0], dtype)
            for gradient, dtype in zip(ctx.saved_tensors, (ctx.hidden_dtype, ctx.weight_dtype), strict=True)
        )
        return grad_hidden_TD, grad_weight_VD, None, None, None


def _scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product in fp32 at least, rounded once: a bfloat16 factor would be off by up to 0.4 %."""
    # A 0-dim factor would be rounded to the gradient's dtype first.
    return torch.mul(gradient, factor.view(1), out=torch.empty_like(gradient, dtype=dtype))


def _is_wrong(labels_T: Tensor, vocab_size: int) -> Tensor:
    return (labels_T.clamp(0, vocab_size - 1) != labels_T) & (labels_T != IGNORE_INDEX)


def _loss_and_gradient(logits_CV: Tensor, labels_C: Tensor, losses_C: Tensor, with_gradient: bool) -> None:
    """Fill the losses of a chunk and, in the place of its logits, their gradient: softmax - one_hot."""
    num_tokens, vocab_size = logits_CV.shape
    if kernels := kernels_for(logits_CV):
        sizes = (IGNORE_INDEX, int(with_gradient), num_tokens, vocab_size)
        kernels.call("cross_entropy", logits_CV, labels_C.contiguous(), losses_C, *sizes)
        return
    label_C1 = labels_C.clamp(0, vocab_size - 1).unsqueeze(1)
    logprob_CV = log_softmax(logits_CV, losses_C.dtype)
    chosen_C1 = logprob_CV.gather(1, label_C1)
    torch.neg(chosen_C1.squeeze(1), out=losses_C)
    if with_gradient:
        torch.exp(logprob_CV, out=logits_CV)
        logits_CV.scatter_(1, label_C1, chosen_C1.expm1_().to(logits_CV.dtype))


def log_softmax(logits_CV: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``log_softmax`` over the vocabulary, right to the last digits whatever the vocabulary's size and order.

    torch's CPU kernel adds the exponentials in float32, one after the other: the many small ones that follow a large
    one are rounded away, which costs up to 6 % of a small loss at a vocabulary of 8,192. Here their sum is float64.

    Returns:
        ``dtype``, shaped like the logits.
    """
    if logits_CV.device.type != "cpu":  # other devices add in trees
        return torch.log_softmax(logits_CV, dim=-1, dtype=dtype)
    logits_CV = logits_CV.to(dtype)
    top_C1 = logits_CV.amax(dim=-1, keepdim=True)
    shifted_CV = logits_CV - top_C1
    return shifted_CV.sub_(shifted_CV.exp().sum(dim=-1, keepdim=True, dtype=torch.float64).log())

"""Gates: softmax, the choice of experts, their weights. All in float32; sums always in the same order.

Letters: T tokens, E experts (zero experts last), K experts of a token.
"""

# What Triton compiles is not what its types say: constants are ints, static_range is an iterable.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moepp.ops.triton.launch import on, rows_per_tile, warps

_NONE, _ZERO_MASKED, _TOPK_SOFTMAX = (tl.constexpr(number) for number in range(3))  # as moepp/ops/gates.py numbers them


@triton.jit
def _gates(
    logits, probs, ids, weights, T, E, first_zero,
    NORMALIZATION: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e, k_of = tl.arange(0, EXPERTS)[None, :], tl.arange(0, CHOICES)[None, :]
    at = t[:, None] * E + e
    inside = (t[:, None] < T) & (e < E)
    z = tl.load(logits + at, mask=inside, other=float("-inf"))
    z = tl.where(t[:, None] < T, z, 0.0)  # rows beyond the end: anything finite
    exps = tl.exp(z - tl.max(z, axis=1)[:, None])
    p = exps / tl.sum(exps, axis=1)[:, None]
    tl.store(probs + at, p, mask=inside)
    scores = z if NORMALIZATION == _TOPK_SOFTMAX else p
    scores = tl.where(scores == scores, scores, float("-inf"))  # NaN is chosen after all others
    free = (e < E) & (t[:, None] >= 0)
    chosen_ids = tl.zeros([ROWS, CHOICES], dtype=tl.int32)
    chosen = tl.zeros([ROWS, CHOICES], dtype=tl.float32)
    for k in tl.static_range(K):
        best = tl.max(tl.where(free, scores, float("-inf")), axis=1)
        # Among equals the lower number.
        which = tl.min(tl.where(free & (scores == best[:, None]), e, EXPERTS), axis=1)
        taken = e == which[:, None]
        free = free & (e != which[:, None])
        weight = tl.sum(tl.where(taken, exps if NORMALIZATION == _TOPK_SOFTMAX else p, 0.0), axis=1)
        if NORMALIZATION == _ZERO_MASKED:
            weight = tl.where(which >= first_zero, 0.0, weight)
        chosen_ids = tl.where(k_of == k, which[:, None], chosen_ids)
        chosen = tl.where(k_of == k, weight[:, None], chosen)
    if NORMALIZATION != _NONE:
        total = tl.sum(chosen, axis=1)[:, None]
        chosen = chosen / tl.where(total == 0, 1.0, total)  # zero experts alone keep their zeros
    to, kept = t[:, None] * K + k_of, (t[:, None] < T) & (k_of < K)
    tl.store(ids + to, chosen_ids.to(tl.int64), mask=kept)
    tl.store(weights + to, chosen, mask=kept)


def gates(
    logits: Tensor, probs: Tensor, ids: Tensor, weights: Tensor, T: int, E: int, K: int, first_zero: int,
    normalization: int,
) -> None:  # fmt: skip
    """From logits[T, E]: probs[T, E], the chosen ids[T, K] and their weights[T, K]."""
    if T:
        experts = triton.next_power_of_2(E)
        sizes = {"ROWS": rows_per_tile(experts), "EXPERTS": experts, "CHOICES": triton.next_power_of_2(K)}
        grid = (triton.cdiv(T, sizes["ROWS"]),)
        with on(logits):
            operands = (logits, probs, ids, weights, T, E, first_zero)
            _gates[grid](*operands, NORMALIZATION=normalization, K=K, **sizes, num_warps=warps(2048))


@triton.jit
def _gates_backward(
    probs, ids, weights, grad_probs, grad_weights, grad_logits, T, E, first_zero,
    NORMALIZATION: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e, valid = tl.arange(0, EXPERTS)[None, :], t < T
    at = t[:, None] * E + e
    inside = valid[:, None] & (e < E)
    p = tl.load(probs + at, mask=inside, other=0.0)
    inner, total = tl.zeros([ROWS], dtype=tl.float32), tl.zeros([ROWS], dtype=tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(ids + t * K + k, mask=valid, other=0)
        inner += tl.load(grad_weights + t * K + k, mask=valid, other=0.0) * tl.load(
            weights + t * K + k, mask=valid, other=0.0
        )
        mine = tl.sum(tl.where(e == expert[:, None], p, 0.0), axis=1)
        total += tl.where(expert >= first_zero, 0.0, mine) if NORMALIZATION == _ZERO_MASKED else mine
    grad = tl.zeros([ROWS, EXPERTS], dtype=tl.float32)
    if grad_probs is not None:
        grad += tl.load(grad_probs + at, mask=inside, other=0.0)
    if NORMALIZATION != _TOPK_SOFTMAX:
        for k in tl.static_range(K):
            expert = tl.load(ids + t * K + k, mask=valid, other=0)
            slope = tl.load(grad_weights + t * K + k, mask=valid, other=0.0)
            if NORMALIZATION == _ZERO_MASKED:
                slope = tl.where(total > 0, (slope - inner) / tl.where(total > 0, total, 1.0), slope)
                slope = tl.where(expert >= first_zero, 0.0, slope)
            grad += tl.where(e == expert[:, None], slope[:, None], 0.0)
    grad = p * (grad - tl.sum(p * grad, axis=1)[:, None])
    if NORMALIZATION == _TOPK_SOFTMAX:
        for k in tl.static_range(K):
            expert = tl.load(ids + t * K + k, mask=valid, other=0)
            slope = tl.load(grad_weights + t * K + k, mask=valid, other=0.0) - inner
            slope *= tl.load(weights + t * K + k, mask=valid, other=0.0)
            grad += tl.where(e == expert[:, None], slope[:, None], 0.0)
    tl.store(grad_logits + at, grad, mask=inside)


def gates_backward(
    probs: Tensor, ids: Tensor, weights: Tensor, grad_probs: Tensor | None, grad_weights: Tensor, grad_logits: Tensor,
    T: int, E: int, K: int, first_zero: int, normalization: int,
) -> None:  # fmt: skip
    """grad_logits[T, E] of gates(), from grad_probs[T, E] (or None) and grad_weights[T, K]."""
    if T:
        experts = triton.next_power_of_2(E)
        sizes = {"ROWS": rows_per_tile(experts), "EXPERTS": experts}
        grid = (triton.cdiv(T, sizes["ROWS"]),)
        with on(probs):
            operands = (probs, ids, weights, grad_probs, grad_weights, grad_logits, T, E, first_zero)
            _gates_backward[grid](*operands, NORMALIZATION=normalization, K=K, **sizes, num_warps=warps(2048))

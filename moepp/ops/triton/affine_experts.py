"""Constant and copy experts (MoE++, arXiv 2410.07348, Eqs. 4 and 5) in one pass over the tokens.

Letters: T tokens, D width, K experts of a token, C constant experts. Experts [first, stop) are meant, the first C of
which are constant.
"""

# What Triton compiles is not what its types say: constants are ints, static_range is an iterable.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moepp.ops.matmul import add_transposed_product
from moepp.ops.triton.launch import block, on, warps


@triton.jit
def _choices(ids, weights, t, C, first, stop, K: tl.constexpr, CHOICES: tl.constexpr):
    """Of one token's choices: weight (0 for other experts), number among the constant experts, whether it is one."""
    k = tl.arange(0, CHOICES)
    expert = tl.load(ids + t * K + k, mask=k < K, other=-1)
    weight = tl.load(weights + t * K + k, mask=k < K, other=0.0)
    chosen = (expert >= first) & (expert < stop) & (weight != 0)
    constant = expert - first
    return tl.where(chosen, weight, 0.0), constant, chosen & (constant < C)


@triton.jit
def _affine_experts(
    x, ids, weights, difference, values, out, alphas, D, C, first, stop,
    K: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    weight, c, is_constant = _choices(ids, weights, t, C, first, stop, K, CHOICES)
    logit = tl.zeros([CHOICES], dtype=tl.float32)
    for begin in range(0, D, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        mine = tl.load(x + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        mask = is_constant[:, None] & (d < D)[None, :]
        logit += tl.sum(mine[None, :] * tl.load(difference + c[:, None] * D + d[None, :], mask=mask, other=0.0), axis=1)
    alpha = tl.where(is_constant, tl.sigmoid(logit), 1.0)
    k = tl.arange(0, CHOICES)
    tl.store(alphas + t * K + k, tl.where(is_constant, alpha, 0.0), mask=k < K)
    scale, factor = tl.sum(weight * alpha, axis=0), weight * (1.0 - alpha)
    for begin in range(0, D, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        mine = tl.load(x + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        mask = is_constant[:, None] & (d < D)[None, :]
        value = tl.load(values + c[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.sum(factor[:, None] * value, axis=0)
        total += tl.where(scale == 0, 0.0, scale * mine)  # a token that chose none of them adds nothing, NaN neither
        tl.store(out + t * D + d, total, mask=d < D)


def affine_experts(
    x: Tensor, ids: Tensor, weights: Tensor, difference: Tensor, values: Tensor, out: Tensor, alphas: Tensor,
    T: int, D: int, K: int, C: int, first: int, stop: int,
) -> None:  # fmt: skip
    """out[t] = (sum_copy w + sum_c w alpha) x[t] + sum_c w (1 - alpha) values[c], alpha = sigmoid(difference[c] x[t]).

    alphas[T, K] are kept for backward. A weight of 0 adds nothing.
    """
    if T and D:
        size, choices = block(D), triton.next_power_of_2(K)
        with on(x):
            operands = (x, ids, weights, difference, values, out, alphas, D, C, first, stop)
            _affine_experts[(T,)](*operands, K=K, CHOICES=choices, BLOCK=size, num_warps=warps(size * choices))


@triton.jit
def _affine_experts_backward(
    grad, x, ids, weights, difference, values, alphas, sum_x, grad_x, grad_weights, slopes, coefficients,
    D, C, first, stop, K: tl.constexpr, CHOICES: tl.constexpr, CONSTANTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    weight, c, is_constant = _choices(ids, weights, t, C, first, stop, K, CHOICES)
    k = tl.arange(0, CHOICES)
    alpha = tl.where(is_constant, tl.load(alphas + t * K + k, mask=k < K, other=0.0), 1.0)
    along_x, along_value = tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([CHOICES], dtype=tl.float32)
    for begin in range(0, D, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        g = tl.load(grad + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        along_x += g * tl.load(x + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        mask = is_constant[:, None] & (d < D)[None, :]
        value = tl.load(values + c[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        along_value += tl.sum(g[None, :] * value, axis=1)
    along = tl.sum(along_x, axis=0)
    tl.store(
        grad_weights + t * K + k, tl.where(weight != 0, alpha * along + (1.0 - alpha) * along_value, 0.0), mask=k < K
    )
    scale = tl.sum(weight * alpha, axis=0)
    slope = tl.where(is_constant, weight * (along - along_value) * alpha * (1.0 - alpha), 0.0)
    if CONSTANTS > 0:
        number = tl.arange(0, CONSTANTS)
        mine = (c[:, None] == number[None, :]) & is_constant[:, None]
        at, inside = t * C + number, number < C
        tl.store(slopes + at, tl.sum(tl.where(mine, slope[:, None], 0.0), axis=0), mask=inside)
        coefficient = weight * (1.0 - alpha)
        tl.store(coefficients + at, tl.sum(tl.where(mine, coefficient[:, None], 0.0), axis=0), mask=inside)
    for begin in range(0, D, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        g = tl.load(grad + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        mask = is_constant[:, None] & (d < D)[None, :]
        direction = tl.load(difference + c[:, None] * D + d[None, :], mask=mask, other=0.0)
        total = scale * g + tl.sum(slope[:, None] * direction, axis=0)
        if sum_x is not None:
            total += tl.load(sum_x + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(grad_x + t * D + d, total, mask=d < D)


def affine_experts_backward(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, difference: Tensor, values: Tensor, alphas: Tensor,
    sum_x: Tensor | None, grad_x: Tensor, grad_weights: Tensor, grad_difference: Tensor, grad_values: Tensor,
    T: int, D: int, K: int, C: int, first: int, stop: int,
) -> None:  # fmt: skip
    """Fill the gradients of affine_experts(); that of x is added to sum_x (None: zeros), which may be grad_x.

    grad_difference[C, D] and grad_values[C, D] are added to: products over the tokens, of x's dtype with float32 sums.
    """
    if T and D:
        size, choices = block(D), triton.next_power_of_2(K)
        slopes, coefficients = x.new_empty(2, T, C)
        with on(x):
            operands = (grad, x, ids, weights, difference, values, alphas, sum_x, grad_x, grad_weights)
            sizes = {"K": K, "CHOICES": choices, "CONSTANTS": triton.next_power_of_2(C) if C else 0, "BLOCK": size}
            numbers = (slopes, coefficients, D, C, first, stop)
            _affine_experts_backward[(T,)](*operands, *numbers, **sizes, num_warps=warps(size * choices))
        if C:
            add_transposed_product(grad_difference, slopes, x)
            add_transposed_product(grad_values, coefficients, grad)

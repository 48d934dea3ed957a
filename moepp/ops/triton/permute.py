"""Rows by token: gathering them, their weighted sums, and the gradients.

Letters: T tokens, D width, K experts of a token, R rows (routed tokens). A position is the row of an assignment, or -1
where it has none.
"""

# What Triton compiles is not what its types say: constants are ints, static_range is an iterable.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moepp.ops.triton.launch import block, on, warps


@triton.jit
def _gather(x, assignments, out, D, K: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(assignments + r) // K
    tl.store(out + r * D + d, tl.load(x + token * D + d, mask=d < D), mask=d < D)


def gather(x: Tensor, assignments: Tensor, out: Tensor, R: int, D: int, K: int) -> None:
    """out[r] = x[assignments[r] // K], the token of every row."""
    if R and D:
        size = block(D)
        with on(out):
            _gather[(R, triton.cdiv(D, size))](x, assignments, out, D, K=K, BLOCK=size, num_warps=warps(size))


@triton.jit
def _combine(rows, positions, weights, start, out, D, K: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if start is not None:
        total += tl.load(start + t * D + d, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        position = tl.load(positions + t * K + k)
        columns = tl.where(position >= 0, D, 0)
        row = tl.load(rows + position * D + d, mask=d < columns, other=0.0).to(tl.float32)
        if weights is not None:
            row = row * tl.load(weights + t * K + k)
        total += row
    tl.store(out + t * D + d, total, mask=inside)


def combine(
    rows: Tensor,
    positions: Tensor,
    weights: Tensor | None,
    start: Tensor | None,
    out: Tensor,
    T: int,
    D: int,
    K: int,
) -> None:
    """out[t] = start[t] + sum_k weights[t, k] rows[positions[t, k]]; no weights are ones, no start is zeros."""
    if T and D:
        size = block(D)
        with on(out):
            grid, operands = (T, triton.cdiv(D, size)), (rows, positions, weights, start, out, D)
            _combine[grid](*operands, K=K, BLOCK=size, num_warps=warps(size))


@triton.jit
def _combine_backward(
    grad, rows, positions, weights, grad_rows, grad_weights, D, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    grad += t * D
    for k in tl.static_range(K):
        position, factor = tl.load(positions + t * K + k), tl.load(weights + t * K + k)
        columns = tl.where(position >= 0, D, 0)
        row, grad_row = rows + position * D, grad_rows + position * D
        dot = tl.zeros([BLOCK], dtype=tl.float32)
        for begin in range(0, D, BLOCK):
            d = begin + tl.arange(0, BLOCK)
            g = tl.load(grad + d, mask=d < D, other=0.0).to(tl.float32)
            dot += g * tl.load(row + d, mask=d < columns, other=0.0).to(tl.float32)
            tl.store(grad_row + d, factor * g, mask=d < columns)
        tl.store(grad_weights + t * K + k, tl.sum(dot, axis=0))


def combine_backward(
    grad: Tensor,
    rows: Tensor,
    positions: Tensor,
    weights: Tensor,
    grad_rows: Tensor,
    grad_weights: Tensor,
    T: int,
    D: int,
    K: int,
) -> None:
    """Compute the gradients of combine() with weights; start's gradient is grad itself."""
    if T and D:
        size = block(D)
        with on(grad):
            operands = (grad, rows, positions, weights, grad_rows, grad_weights, D)
            _combine_backward[(T,)](*operands, K=K, BLOCK=size, num_warps=warps(size))

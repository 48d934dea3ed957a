"""Triton kernels for accelerators: SwiGLU, and the sums of rows by token with their gradients.

They compute what the functions of the same names in ``moe.c`` do, with the same arguments. Import this module only
where Triton is wanted: it needs the package. With TRITON_INTERPRET=1 in the environment before that, they run on the
CPU, slowly.

Letters: T tokens, D width, K experts of a token, R rows (routed tokens), F expert width. A position is the row of an
assignment, or -1 where it has none.
"""

# What Triton compiles is not what its types say: constants are ints, static_range is an iterable.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST_BLOCK = 1024  # columns that one program handles at a time


class TritonRows:
    """The kernels by name, to be called as those of a compiled :class:`~moepp.ops.cpu.build.Library`."""

    def call(self, name: str, *arguments: Tensor | int | None) -> None:
        """Run a kernel; tensors must be dense (rows may lie apart only where the kernel takes a stride)."""
        _KERNELS[name](*arguments)


def _block(width: int) -> int:
    return min(triton.next_power_of_2(width), _LARGEST_BLOCK)


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current, on which Triton launches."""
    return nullcontext() if tensor.device.type == "cpu" else torch.accelerator.device_index(tensor.device.index)


# ---- SwiGLU ----


@triton.jit
def _swiglu(gate, gate_stride, up, up_stride, act, act_stride, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    x = tl.load(gate + row * gate_stride + f, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(act + row * act_stride + f, x * tl.sigmoid(x) * u, mask=inside)


def swiglu(
    gate: Tensor, gate_stride: int, up: Tensor, up_stride: int, act: Tensor, act_stride: int, R: int, F: int
) -> None:
    """act[R, F] = silu(gate) * up, rows lying so far apart; act may take the place of gate."""
    if R and F:
        block = _block(F)
        with _on(act):
            _swiglu[(R, triton.cdiv(F, block))](gate, gate_stride, up, up_stride, act, act_stride, F, BLOCK=block)


@triton.jit
def _swiglu_backward(gate_up, grad_act, grad_gate_up, act, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    gate, narrow = row * 2 * F + f, row * F + f
    x = tl.load(gate_up + gate, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up + gate + F, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_act + narrow, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(x)
    silu = x * s
    tl.store(grad_gate_up + gate, g * u * (s + silu * (1.0 - s)), mask=inside)
    tl.store(grad_gate_up + gate + F, g * silu, mask=inside)
    if act is not None:
        tl.store(act + narrow, silu * u, mask=inside)


def swiglu_backward(
    gate_up: Tensor, grad_act: Tensor, grad_gate_up: Tensor, act: Tensor | None, R: int, F: int
) -> None:
    """Compute grad_gate_up[R, 2F] from gate_up[R, 2F] and grad_act[R, F], and act[R, F] again unless it is None.

    act may be grad_act.
    """
    if R and F:
        block = _block(F)
        with _on(gate_up):
            _swiglu_backward[(R, triton.cdiv(F, block))](gate_up, grad_act, grad_gate_up, act, F, BLOCK=block)


# ---- sums of rows by token ----


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
        block = _block(D)
        with _on(out):
            _combine[(T, triton.cdiv(D, block))](rows, positions, weights, start, out, D, K=K, BLOCK=block)


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
        with _on(grad):
            operands = (grad, rows, positions, weights, grad_rows, grad_weights, D)
            _combine_backward[(T,)](*operands, K=K, BLOCK=_block(D))


_KERNELS: dict[str, Callable[..., None]] = {
    "swiglu": swiglu,
    "swiglu_backward": swiglu_backward,
    "combine": combine,
    "combine_backward": combine_backward,
}

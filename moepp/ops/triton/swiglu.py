"""SwiGLU. Letters: R rows (routed tokens), F expert width."""

# What Triton compiles is not what its types say: constants are ints, static_range is an iterable.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moepp.ops.triton.launch import block, on, warps


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
    """Compute act[R, F] = silu(gate) * up; strides are those of rows; act may be gate's memory."""
    if R and F:
        size = block(F)
        operands = (gate, gate_stride, up, up_stride, act, act_stride, F)
        with on(act):
            _swiglu[(R, triton.cdiv(F, size))](*operands, BLOCK=size, num_warps=warps(size))


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
    """From gate_up[R, 2F] and grad_act[R, F]: grad_gate_up[R, 2F], and act[R, F] again unless it is None.

    act may be grad_act.
    """
    if R and F:
        size = block(F)
        with on(gate_up):
            grid = (R, triton.cdiv(F, size))
            _swiglu_backward[grid](gate_up, grad_act, grad_gate_up, act, F, BLOCK=size, num_warps=warps(size))

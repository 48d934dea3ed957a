"""Rotary position embeddings. Letters: B batch, S sequence, H heads, d head size, h = d/2."""

# What Triton compiles is not what its types say: constants are ints, static_range is an iterable.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moepp.ops.triton.launch import on, warps


@triton.jit
def _rotate(
    x, cos, sin, out, sign, S, H, h, x_b, x_h, x_s, out_b, out_h, out_s, angle_b, angle_s,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    b, s = position // S, position % S
    head, i = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, HALF)[None, :]
    inside = (head < H) & (i < h)
    c = tl.load(cos + b * angle_b + s * angle_s + i, mask=i < h, other=0.0).to(tl.float32)
    z = tl.load(sin + b * angle_b + s * angle_s + i, mask=i < h, other=0.0).to(tl.float32) * sign
    source = x + b * x_b + s * x_s + head * x_h + i
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + h, mask=inside, other=0.0).to(tl.float32)
    target = out + b * out_b + s * out_s + head * out_h + i
    tl.store(target, first * c - second * z, mask=inside)
    tl.store(target + h, second * c + first * z, mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, sign: int) -> None:
    """Rotate the pairs (i, i + h) of x[B, H, S, d] by sign times the angles of cos and sin [1 or B, 1, S, h].

    Rows of x and out may lie apart; those of the angles lie alike.
    """
    B, H, S, d = x.shape
    if x.numel():
        heads, half = triton.next_power_of_2(H), triton.next_power_of_2(d // 2)
        strides = (*x.stride()[:3], *out.stride()[:3], cos.stride(0) if len(cos) > 1 else 0, cos.stride(2))
        with on(x):
            operands = (x, cos, sin, out, sign, S, H, d // 2)
            _rotate[(B * S,)](*operands, *strides, HEADS=heads, HALF=half, num_warps=warps(heads * half))

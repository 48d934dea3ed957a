"""Softmax and cross-entropy of a chunk of logits. Letters: C tokens of the chunk, V vocabulary."""

# What Triton compiles is not what its types say: constants are ints, static_range is an iterable.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moepp.ops.triton.launch import on, warps

_BLOCK = 4096  # each lane adds V / 4096 exponentials; the lanes' sums are added as a tree


@triton.jit
def _cross_entropy(logits, labels, losses, ignore, V, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * V
    is_ignored, is_wrong = label == ignore, (label != ignore) & ((label < 0) | (label >= V))
    known = tl.where(is_ignored | is_wrong, 0, label)
    # Read before the reductions, at which all warps meet: after them one may store gradients where another still reads.
    chosen = tl.load(logits + known).to(tl.float32)
    lowest = -3.0e38  # finite: lanes without a logit must not subtract infinities
    top, total = tl.full([BLOCK], lowest, dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, V, BLOCK):
        v = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + v, mask=v < V, other=lowest).to(tl.float32)
        higher = tl.maximum(top, x)
        total = total * tl.exp(top - higher) + tl.where(v < V, tl.exp(x - higher), 0.0)
        top = higher
    highest = tl.max(top, axis=0)
    denominator = tl.sum(total * tl.exp(top - highest), axis=0)
    loss = tl.log(denominator) + (highest - chosen)
    loss = tl.where(is_wrong, float("nan"), tl.where(is_ignored, 0.0, loss))
    tl.store(losses + row, loss)
    if WITH_GRADIENT:
        scale = tl.where(is_wrong, float("nan"), 1.0 / denominator)
        for begin in range(0, V, BLOCK):
            v = begin + tl.arange(0, BLOCK)
            x = tl.load(logits + v, mask=v < V, other=lowest).to(tl.float32)
            gradient = tl.exp(x - highest) * scale - tl.where(v == known, 1.0, 0.0)
            tl.store(logits + v, tl.where(is_ignored, 0.0, gradient), mask=v < V)


def cross_entropy(
    logits: Tensor, labels: Tensor, losses: Tensor, ignore: int, with_gradient: int, C: int, V: int
) -> None:
    """losses[C] = -log softmax(logits)[label]; softmax - one_hot(label) in place of logits[C, V] where with_gradient.

    A token whose label is ``ignore`` has no loss and a gradient of zeros; one whose label is out of range gets NaN in
    both.
    """
    if C:
        size = min(_BLOCK, triton.next_power_of_2(V))
        with on(logits):
            operands = (logits, labels, losses, ignore, V)
            _cross_entropy[(C,)](*operands, WITH_GRADIENT=bool(with_gradient), BLOCK=size, num_warps=warps(size))

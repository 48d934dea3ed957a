"""Passes over memory between the model's matrix products.

The seam: CPU tensors of bfloat16 and float32 go through kernels compiled for the machine, everything else (and a
machine without a C compiler) through torch operations with the same results up to rounding. Callers ask
:func:`compiled` for the library of a tensor and write down both ways.
"""

from moepp.kernels.build import Library
from moepp.kernels.common import (
    compiled,
    compiled_for,
    dense_transpose,
    describe,
    matmul_transposed,
    repacks_right_factor,
    torch_only,
    transpose,
)

__all__ = [
    "Library",
    "compiled",
    "compiled_for",
    "dense_transpose",
    "describe",
    "matmul_transposed",
    "repacks_right_factor",
    "torch_only",
    "transpose",
]

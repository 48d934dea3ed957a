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
    describe_experts,
    matmul_transposed,
    repacks_right_factor,
    require_triton,
    row_kernels,
    torch_only,
    transpose,
)
from moepp.kernels.products import linear, mm, multiplies_in_float32

__all__ = [
    "Library",
    "compiled",
    "compiled_for",
    "dense_transpose",
    "describe",
    "describe_experts",
    "linear",
    "matmul_transposed",
    "mm",
    "multiplies_in_float32",
    "repacks_right_factor",
    "require_triton",
    "row_kernels",
    "torch_only",
    "transpose",
]

"""What stands between the MoE layer's matrix products, each in one pass over memory where the machine allows it.

The seam: CPU tensors of bfloat16 and float32 go through the compiled kernels of ``cpu.c``, everything else (and a
machine without a C compiler) through torch operations with the same results up to rounding.
"""

from moepp.moe.kernels.functions import (
    Affine,
    RowOrder,
    SlotOrder,
    combine_rows,
    count_experts,
    describe,
    gather_rows,
    linear_fp32,
    matmul_transposed,
    project,
    repacks_right_factor,
    sort_slots,
    swiglu,
    swiglu_backward,
    top_experts,
    torch_only,
    transpose,
)

__all__ = [
    "Affine",
    "RowOrder",
    "SlotOrder",
    "combine_rows",
    "count_experts",
    "describe",
    "gather_rows",
    "linear_fp32",
    "matmul_transposed",
    "project",
    "repacks_right_factor",
    "sort_slots",
    "swiglu",
    "swiglu_backward",
    "top_experts",
    "torch_only",
    "transpose",
]

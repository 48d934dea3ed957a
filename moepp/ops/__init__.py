"""One file per operation of the model, each with torch's operations as its reference.

On the CPU, kernels compiled for the machine (:mod:`moepp.ops.cpu`) take their place, and Triton's where they are chosen
(:mod:`moepp.ops.triton`); see :mod:`moepp.ops.backend`. Who calls an operation does not see the difference.
"""

from moepp.ops.affine_experts import affine_experts
from moepp.ops.assignments import SortedAssignments, count_experts, places_by_expert, sort_assignments
from moepp.ops.attention import AttentionMask, attend, document_mask
from moepp.ops.backend import choose_kernels, describe, use_kernels
from moepp.ops.cross_entropy import chunked_cross_entropy, log_softmax
from moepp.ops.expert_products import expert_products, takes_device_counts, use_grouped_products
from moepp.ops.gates import NORMALIZATIONS as GATE_NORMALIZATIONS
from moepp.ops.gates import softmax_gates
from moepp.ops.grouped_swiglu import grouped_swiglu
from moepp.ops.matmul import add_linear_fp32, linear, linear_fp32, multiplies_in_float32
from moepp.ops.permute import RowOrder, combine_rows, donate, gather_ahead, gather_rows, wants_spare_row
from moepp.ops.projection import project
from moepp.ops.rms_norm import rms_norm
from moepp.ops.rotary import rotate
from moepp.ops.shared_gradient import share_gradient

__all__ = [
    "GATE_NORMALIZATIONS",
    "AttentionMask",
    "RowOrder",
    "SortedAssignments",
    "add_linear_fp32",
    "affine_experts",
    "attend",
    "choose_kernels",
    "chunked_cross_entropy",
    "combine_rows",
    "count_experts",
    "describe",
    "document_mask",
    "donate",
    "expert_products",
    "gather_ahead",
    "gather_rows",
    "grouped_swiglu",
    "linear",
    "linear_fp32",
    "log_softmax",
    "multiplies_in_float32",
    "places_by_expert",
    "project",
    "rms_norm",
    "rotate",
    "share_gradient",
    "softmax_gates",
    "sort_assignments",
    "takes_device_counts",
    "use_grouped_products",
    "use_kernels",
    "wants_spare_row",
]

"""Counting and sorting the (token, expert) assignments of a router.

Shapes: T tokens, K experts of a token, A = T·K assignments, E experts. Assignment t·K + k is the k-th of token t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moepp.ops.backend import cpu_kernels


@dataclass(frozen=True)
class SortedAssignments:
    """Assignments sorted by expert.

    Attributes:
        assignments_A: their numbers, those of expert 0 first, in the order of tokens; beyond ``counts_E.sum()`` those
            that were left out (with the CPU's kernels: undefined).
        counts_E: assignments of each expert, int64.
        positions_TK: where each assignment lies in ``assignments_A``, or -1 where it was left out.
    """

    assignments_A: Tensor
    counts_E: Tensor
    positions_TK: Tensor


@torch.no_grad()
def sort_assignments(sort_keys_TK: Tensor, num_experts: int) -> SortedAssignments:
    """Sort the assignments with keys below ``num_experts`` (int64), leave out the others; no host synchronisation."""
    keys_A = sort_keys_TK.flatten()
    counts_E = keys_A.new_empty(num_experts)
    assignments_A, positions_A = torch.empty_like(keys_A), torch.empty_like(keys_A)
    if kernels := cpu_kernels(keys_A, torch.float32):
        kernels.call("sort_assignments", keys_A, assignments_A, counts_E, positions_A, keys_A.numel(), num_experts)
    else:
        torch.argsort(keys_A.clamp(max=num_experts), stable=True, out=assignments_A)
        counts_E = count_experts(keys_A, num_experts)
        positions_A.scatter_(0, assignments_A, torch.arange(keys_A.numel(), device=keys_A.device))
        positions_A.masked_fill_(keys_A >= num_experts, -1)
    return SortedAssignments(assignments_A, counts_E, positions_A.view_as(sort_keys_TK))


def count_experts(experts_A: Tensor, num_experts: int) -> Tensor:
    """Return how often each of the first ``num_experts`` experts occurs: int64 [E]; no host synchronisation."""
    if kernels := cpu_kernels(experts_A, torch.float32):
        counts_E = experts_A.new_empty(num_experts)
        kernels.call("count_experts", experts_A.contiguous(), counts_E, experts_A.numel(), num_experts)
        return counts_E
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts_A.device)
    counts.scatter_add_(0, experts_A.clamp(max=num_experts), torch.ones_like(experts_A))
    return counts[:num_experts]

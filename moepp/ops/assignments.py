"""Counting and sorting the (token, expert) assignments of a router.

Shapes: T tokens, K experts of a token, A = T·K assignments, E experts. Assignment t·K + k is the k-th of token t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp.ops.backend import cpu_kernels
from moepp.ops.constants import numbers


@dataclass(frozen=True)
class SortedAssignments:
    """Assignments sorted by expert.

    Attributes:
        assignments_A: their numbers, those of expert 0 first, in the order of tokens; beyond ``counts_E.sum()`` those
            that were left out (with the CPU's kernels: undefined).
        counts_E: assignments of each expert, int64.
        positions_TK: where each assignment lies in ``assignments_A``, or -1 where it was left out.
        counts_X: assignments of each possible key, where the sort counts them along.
    """

    assignments_A: Tensor
    counts_E: Tensor
    positions_TK: Tensor
    counts_X: Tensor | None = None


@torch.no_grad()
def sort_assignments(sort_keys_TK: Tensor, num_experts: int, num_keys: int | None = None) -> SortedAssignments:
    """Sort the assignments with keys below ``num_experts`` (int64), leave out the others; no host synchronisation.

    ``num_keys`` is one more than the largest key there may be, where it is known: small keys sort faster.
    """
    keys_A = sort_keys_TK.flatten().contiguous()  # one column of a wider tensor flattens to a strided view
    if kernels := cpu_kernels(keys_A, torch.float32):
        counts_E, positions_A = keys_A.new_empty(num_experts), torch.empty_like(keys_A)
        assignments_A = torch.empty_like(keys_A)
        kernels.call("sort_assignments", keys_A, assignments_A, counts_E, positions_A, keys_A.numel(), num_experts)
        return SortedAssignments(assignments_A, counts_E, positions_A.view_as(sort_keys_TK))
    narrow_A = _narrow(keys_A, num_keys)
    sorted_A, assignments_A = torch.sort(narrow_A, stable=True)
    counts_X = _starts(sorted_A, num_experts if num_keys is None else num_keys).diff()
    positions_A = _inverse(assignments_A).masked_fill_(narrow_A >= num_experts, -1)
    return SortedAssignments(assignments_A, counts_X[:num_experts], positions_A.view_as(sort_keys_TK), counts_X)


@torch.no_grad()
def places_by_expert(experts_A: Tensor, num_experts: int, order_A: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the place of each assignment among those sorted by expert, and where each expert begins, int64 [E + 1].

    Assignments of one expert come as in ``order_A`` (None: one after the other). No host synchronisation.
    """
    if cpu_kernels(experts_A, torch.float32) is not None:
        given_A = experts_A if order_A is None else experts_A[order_A]
        by_expert_A = torch.argsort(given_A, stable=True)
        starts_E1 = F.pad(torch.cumsum(count_experts(experts_A, num_experts), 0), (1, 0))
    else:
        narrow_A = _narrow(experts_A, num_experts + 1)
        sorted_A, by_expert_A = torch.sort(narrow_A if order_A is None else narrow_A[order_A], stable=True)
        starts_E1 = _starts(sorted_A, num_experts)
    return _inverse(by_expert_A if order_A is None else order_A[by_expert_A]), starts_E1


def _inverse(order_A: Tensor) -> Tensor:
    """Return where each number lies in ``order_A``."""
    return torch.empty_like(order_A).scatter_(0, order_A, numbers(len(order_A), order_A))


def _narrow(keys_A: Tensor, num_keys: int | None) -> Tensor:
    """Return the keys in the smallest type that holds ``num_keys``: a radix sort passes over each byte."""
    if num_keys is None or num_keys > torch.iinfo(torch.int16).max:
        return keys_A
    return keys_A.to(torch.uint8 if num_keys <= torch.iinfo(torch.uint8).max else torch.int16)


def _starts(sorted_A: Tensor, num_keys: int) -> Tensor:
    """Return where each key begins, and where the last one ends: int64 [num_keys + 1]."""
    return torch.searchsorted(sorted_A, numbers(num_keys + 1, sorted_A, sorted_A.dtype))


def count_experts(experts_A: Tensor, num_experts: int) -> Tensor:
    """Return how often each of the first ``num_experts`` experts occurs: int64 [E]; no host synchronisation."""
    if kernels := cpu_kernels(experts_A, torch.float32):
        counts_E = experts_A.new_empty(num_experts)
        kernels.call("count_experts", experts_A.contiguous(), counts_E, experts_A.numel(), num_experts)
        return counts_E
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts_A.device)
    counts.scatter_add_(0, experts_A.clamp(max=num_experts), torch.ones_like(experts_A))
    return counts[:num_experts]

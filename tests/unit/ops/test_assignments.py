"""Sort keys are as small as their number allows: a radix sort passes over every byte."""

from __future__ import annotations

import pytest
import torch

from moepp import ops
from moepp.ops import use_kernels


@pytest.mark.parametrize(
    ("num_keys", "dtype"),
    [(2, torch.uint8), (255, torch.uint8), (256, torch.int16), (32767, torch.int16), (32768, torch.int64)],
)
def test_keys_are_narrow_and_sorted_rightly_up_to_the_largest(num_keys, dtype, monkeypatch):
    keys = torch.tensor([[num_keys - 1, 0], [num_keys // 2, num_keys - 2], [0, num_keys - 1]])
    sort, seen = torch.sort, []
    monkeypatch.setattr(torch, "sort", lambda keys, **how: seen.append(keys.dtype) or sort(keys, **how))
    with use_kernels("torch"):
        found = ops.sort_assignments(keys, num_keys - 1, num_keys)  # the last key is left out
    assert seen == [dtype]
    kept = [(key, number) for number, key in enumerate(keys.flatten().tolist()) if key < num_keys - 1]
    assert found.assignments_A[: len(kept)].tolist() == [number for _, number in sorted(kept)]
    assert found.counts_E.tolist() == [sum(key == expert for key, _ in kept) for expert in range(num_keys - 1)]
    assert (found.positions_TK == -1).tolist() == (keys == num_keys - 1).tolist()

"""Sums of rows by token with torch's operations, as an accelerator runs them, and all gradients against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moepp.ops import RowOrder, combine_rows, use_kernels

NAN = float("nan")
# Four tokens of two assignments each; rows 0 to 4 belong to one, in the order of the experts. Any others hold NaN.
POSITIONS_TK = torch.tensor([[3, 0], [-1, -1], [1, -1], [4, 2]])
ASSIGNMENTS_R = torch.tensor([1, 4, 7, 0, 6])


def order_of(more_rows: int, has_spare: bool) -> RowOrder:
    return RowOrder(torch.cat([ASSIGNMENTS_R, torch.zeros(more_rows).long()]), POSITIONS_TK, has_spare)


@pytest.mark.parametrize(("more_rows", "has_spare"), [(0, False), (2, False), (1, True), (3, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_of_rows_and_all_gradients(dtype, more_rows, has_spare):
    torch.manual_seed(0)
    weights_dtype = torch.promote_types(dtype, torch.float32)
    rows_RD = torch.cat([torch.randn(5, 70), torch.full((more_rows, 70), NAN)]).to(dtype).requires_grad_()
    weights_TK = torch.rand(4, 2, dtype=weights_dtype).requires_grad_()
    start_TD, grad_TD = torch.randn(4, 70).to(dtype), torch.randn(4, 70).to(dtype)
    with use_kernels("torch"):
        out_TD = combine_rows(rows_RD, order_of(more_rows, has_spare), weights_TK, start_TD.clone())
        out_TD.backward(grad_TD)
    rows, weights, grad = rows_RD.detach().double(), weights_TK.detach().double(), grad_TD.double()
    wanted_TD, wanted_rows, wanted_weights = start_TD.double(), torch.zeros(5, 70).double(), torch.zeros(4, 2).double()
    for t, k in (POSITIONS_TK >= 0).nonzero().tolist():
        row = int(POSITIONS_TK[t, k])
        wanted_TD[t] += weights[t, k] * rows[row]
        wanted_rows[row] = weights[t, k] * grad[t]
        wanted_weights[t, k] = rows[row] @ grad[t]
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    close: dict[str, Any] = {"rtol": limit, "atol": limit}
    torch.testing.assert_close(out_TD.detach().double(), wanted_TD, **close)
    assert rows_RD.grad is not None and weights_TK.grad is not None
    torch.testing.assert_close(rows_RD.grad[:5].double(), wanted_rows, **close)
    assert weights_TK.grad.dtype == weights_dtype
    close["atol"] *= 3  # of sums of 70 products
    torch.testing.assert_close(weights_TK.grad.double(), wanted_weights, **close)
    assert weights_TK.grad[1].tolist() == [0, 0]


@pytest.mark.parametrize("has_spare", [False, True])
def test_gradients_of_gate_weights_are_not_rounded_to_the_rows_dtype(has_spare):
    """256 + 1 lies between two numbers of bfloat16."""
    rows_RD = torch.tensor([[16.0, 1.0]] + [[NAN, NAN]] * has_spare, dtype=torch.bfloat16)
    order = RowOrder(torch.zeros(len(rows_RD)).long(), torch.tensor([[0]]), has_spare)
    weights_TK = torch.ones(1, 1, requires_grad=True)
    with use_kernels("torch"):
        combine_rows(rows_RD, order, weights_TK).backward(torch.tensor([[16.0, 1.0]], dtype=torch.bfloat16))
    assert weights_TK.grad is not None and weights_TK.grad.item() == 257

"""Sums of squares of millions of float32 numbers, against exact sums."""

from __future__ import annotations

import math

import pytest
import torch

from moepp.engine.norms import rough_squared_norms, squared_norm, squared_norms, squared_norms_at_once

CPU = torch.device("cpu")


def numbers(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(2**22 + 12_346, generator=generator) * 1e-4
    if kind == "large ones first":
        small[:1000] = 0.3
    elif kind == "large ones last":
        small[-1000:] = 0.3
    elif kind == "one large one in each part":
        small[:: 2**12] = 1.0
    elif kind == "equal":
        small.fill_(0.1)
    return small


@pytest.mark.parametrize(
    "kind", ["random", "large ones first", "large ones last", "one large one in each part", "equal"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sum_of_squares_is_that_of_exact_arithmetic(kind, dtype):
    tensor = numbers(kind).to(dtype)
    exact = math.fsum((tensor.double() ** 2).tolist())
    found = squared_norm(tensor)
    assert found.dtype == torch.float64 and found.shape == ()
    assert float(found) == pytest.approx(exact, rel=1e-12)
    [rough] = rough_squared_norms([tensor.view(5, -1).t()], CPU).tolist()
    assert rough == pytest.approx(exact, rel=3e-7)


def test_any_shape_and_strides():
    matrix = torch.arange(12.0).reshape(3, 4).t()[::2]
    assert float(squared_norm(matrix)) == float((matrix.double() ** 2).sum())
    assert float(squared_norm(torch.tensor(3.0))) == 9.0
    assert float(squared_norm(torch.empty(0, 3))) == 0.0
    shapes = [matrix, torch.tensor(3.0), torch.empty(0, 3), torch.full((257, 3), 2.0)]
    assert rough_squared_norms(shapes, CPU).tolist() == [float((x.double() ** 2).sum()) for x in shapes]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(value):
    assert not math.isfinite(float(squared_norm(torch.tensor([1.0, value, 2.0]))))
    assert math.isfinite(float(squared_norm(torch.full((3,), 3e38))))  # its float32 square would not be
    broken, large = torch.full((2, 600), 3e38)
    broken[100] = value
    found = rough_squared_norms([broken, large], CPU).tolist()
    assert not math.isfinite(found[0]) and found[1] == pytest.approx(600 * 3e38**2, rel=1e-6)


def test_many_tensors_at_once_have_each_its_sum():
    kinds = ("random", "large ones first", "one large one in each part")
    tensors = [numbers(kind)[: 2**20 + 3].view(-1, 1) for kind in kinds] + [torch.empty(0, 3), torch.tensor(3.0)]
    exact = [math.fsum((tensor.double() ** 2).flatten().tolist()) for tensor in tensors]
    for found in (squared_norms(tensors, torch.device("cpu")), squared_norms_at_once(tensors)):
        assert found.dtype == torch.float64 and found.tolist() == pytest.approx(exact, rel=1e-11)
    assert squared_norms([], torch.device("cpu")).tolist() == []

"""The native engine sums gradients in buckets while backward goes on: the sums, their order, and when they start."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import nn

from moepp.config import OptimConfig
from moepp.distributed import comm
from moepp.engine.native import NativeEngine
from tests.parity import group_of

Tensor = torch.Tensor
OPTIM = OptimConfig(name="sgd", weight_decay=0.0, grad_clip=None)
WIDTHS = (40, 7, 30, 90, 5)  # of weights with two rows: buckets of 50 numbers hold the last two, one, the first two


class Chain(nn.Module):
    """Weights used one after the other, so that backward comes to the last one first."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(2, size, generator=generator).to(dtype) for size in WIDTHS]
        self.weights = nn.ParameterList(drawn)

    def forward(self, factor: float, skipped: int | None = None) -> Tensor:
        """Every weight's gradient is that of a polynomial in its own values, ``factor`` and the weights before it."""
        total = torch.ones(())
        for index, weight in enumerate(self.weights):
            if index != skipped:
                row = torch.arange(1.0, weight.shape[1] + 1)
                total = total * factor / 2 + (weight.float() * row).sum() / 100
        return total


def _step(
    rank: int, dtype: torch.dtype, bucket_elements: int, skips: dict[int, int]
) -> tuple[list[Tensor], list[Tensor], int, list[int]]:
    """Gradients of two micro-batches as the engine has them and as they should be; sums started by the end of backward;
    first weight of each bucket in the order of their starts."""
    groups, model, oracle = group_of(1), Chain(dtype), Chain(dtype)
    engine = NativeEngine(model, groups, OPTIM, accumulation_steps=2, bucket_elements=bucket_elements)
    started: list[int] = []
    views = [view.data_ptr() for view in engine._flat[0].grad_views]
    right = comm.start_all_reduce_sum

    def spy(tensor: Tensor, group: comm.Group | None) -> comm.Pending:
        started.append(views.index(tensor.data_ptr()))
        return right(tensor, group)

    factors = [1.0 + rank, 0.5 - rank / 10]
    with patch.object(comm, "start_all_reduce_sum", spy):
        engine.backward(model(3.0))
        engine.backward(model(4.0))
        engine.step(lr=0.0, update=False)  # nothing of this step may be left
        started.clear()
        engine.backward(model(factors[0], skips.get(rank)))
        assert not started
        engine.backward(model(factors[1], skips.get(rank)))
        during_backward = len(started)
        engine._reduction.finish()
    for factor in factors:
        (oracle(factor, skips.get(rank)) / (2 * groups.world_size)).backward()
    wanted = []
    for weight in oracle.weights:
        grad = torch.zeros_like(weight, dtype=torch.float32) if weight.grad is None else weight.grad.float()
        wanted.append(comm.all_reduce_sum(grad.clone(), groups.world))
    observed = [view.clone() for view in engine._flat[0].grad_views]
    return observed, wanted, during_backward, started


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bucket_elements", [1, 50, 10**6])
def test_gradients_are_the_sums_over_ranks_and_start_with_the_last_weights(pools, ranks, dtype, bucket_elements):
    for observed, wanted, during_backward, started in pools(ranks).run(_step, dtype, bucket_elements, {}):
        for mine, theirs in zip(observed, wanted, strict=True):
            # bf16 rounds each micro-batch's gradient, and the oracle their sum too.
            torch.testing.assert_close(mine, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
        if ranks == 1:
            assert started == []
        else:
            assert started == sorted(started, reverse=True) and len(started) == during_backward
            assert len(started) == {1: 5, 50: 3, 10**6: 1}[bucket_elements]


@pytest.mark.parametrize("bucket_elements", [1, 50, 10**6])
@pytest.mark.parametrize("skips", [{0: 3}, {1: 4}, {0: 2, 1: 2}])
def test_a_weight_without_gradient_on_some_rank_delays_the_sums_but_changes_neither_them_nor_their_order(
    pool_2, bucket_elements, skips
):
    results = pool_2.run(_step, torch.float32, bucket_elements, skips)
    orders = [started for *_, started in results]
    assert orders[0] == orders[1] == sorted(orders[0], reverse=True)
    assert any(during_backward < len(started) for _, _, during_backward, started in results)
    for observed, wanted, *_ in results:
        for mine, theirs in zip(observed, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def _backward_too_often(rank: int) -> None:
    model = Chain(torch.float32)
    engine = NativeEngine(model, group_of(1), OPTIM, accumulation_steps=1)
    engine.backward(model(1.0))
    engine.backward(model(1.0))


def test_a_backward_after_the_last_one_is_refused(pool_2):
    pool_2.run(_backward_too_often, raises=AssertionError)

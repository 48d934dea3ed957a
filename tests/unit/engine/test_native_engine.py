"""The native engine's gradient buffer: written once per step, summed over micro-batches, zeros where nothing came."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moepp.bench.peers import one_process_group
from moepp.config import OptimConfig
from moepp.distributed.groups import Layout, build_groups
from moepp.engine.native import NativeEngine

CPU = torch.device("cpu")


class TwoWeights(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(5, generator=generator).to(dtype))
        self.second = nn.Parameter(torch.randn(7, generator=generator).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_the_sum_of_this_steps_micro_batches_alone(dtype):
    with one_process_group(CPU):
        model = TwoWeights(dtype)
        optim = OptimConfig(name="sgd", weight_decay=0.0, grad_clip=None)
        engine = NativeEngine(model, build_groups(Layout(1), CPU), optim, accumulation_steps=2)
        factors = torch.arange(1.0, 6.0)
        for micro_batch in (1.0, 3.0):
            engine.backward((model.first * factors).sum() * micro_batch + model.second.sum() * micro_batch)
        norm = engine.step(lr=0.0).grad_norm
        assert norm == pytest.approx(float(torch.cat((2 * factors, torch.full((7,), 2.0))).norm()), rel=1e-6)
        engine.backward((model.first * factors).sum() * 6)
        norm = engine.step(lr=0.0).grad_norm  # nothing of `second` is left over from the step before
        assert norm == pytest.approx(float((3 * factors).norm()), rel=1e-6)

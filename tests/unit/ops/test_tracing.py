"""Tracers see torch's operations, not compiled kernels that read memory which a tracer's tensors do not have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moepp import MoEConfig, MoELayer, ops
from moepp.ops.backend import cpu_kernels

CONFIG = MoEConfig(
    num_ffn_experts=4, num_constant_experts=2, num_copy_experts=1, num_zero_experts=1, ffn_hidden_size=16, top_k=2
)


def every_operation() -> dict[str, Tensor]:
    """Outputs of the operations around the FFN experts for 6 tokens of width 8."""
    x, weight, alpha, value = torch.randn(6, 8), torch.randn(8, 8), torch.randn(2, 2, 8), torch.randn(2, 8)
    logits = ops.project(x, weight)
    probs, ids, weights = ops.softmax_gates(logits, 2, range(7, 8), "zero_masked")
    order = ops.sort_assignments(ids, 4)
    return {
        "project": logits,
        "gates": probs,
        "weights": weights,
        "affine_experts": ops.affine_experts(x, ids, weights, alpha, value, range(4, 7)),
        "counts": order.counts_E,
        "positions": order.positions_TK,
        "load": ops.count_experts(ids.flatten(), 8),
    }


def test_fake_tensors_get_the_shapes_and_types_of_real_ones():
    real = {name: (value.shape, value.dtype) for name, value in every_operation().items()}
    with FakeTensorMode():
        fake = every_operation()
    assert {name: (value.shape, value.dtype) for name, value in fake.items()} == real


def test_tensors_of_function_transforms_do_not_reach_compiled_kernels():
    if cpu_kernels(torch.ones(1)) is None:
        pytest.skip("there are no compiled kernels here")
    seen = []
    torch.vmap(lambda row_D: seen.append(cpu_kernels(row_D)) or row_D)(torch.ones(2, 3))
    assert seen == [None]


@pytest.mark.slow
def test_a_compiled_layer_equals_the_eager_one_in_outputs_and_gradients():
    torch.manual_seed(0)
    layer = MoELayer(CONFIG, 8)
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager")):
        layer.zero_grad()
        x = torch.linspace(-1, 1, 12 * 8).sin().view(12, 8).requires_grad_()
        out = run(x)
        (out.hidden.square().sum() + out.aux_loss).backward()
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        results.append({"hidden": out.hidden.detach(), "logits": out.router_logits.detach(), "x": x.grad} | gradients)
    for name, wanted in results[0].items():
        torch.testing.assert_close(
            results[1][name], wanted, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )

"""RMSNorm against float64, its gradients, and what it keeps for backward."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from moepp.ops import rms_norm

Tensor = torch.Tensor
EPS = 1e-3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.2e-2}


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([weight * row / ((row * row).sum() / len(row) + EPS).sqrt() for row in x])


@pytest.mark.parametrize("fused", [False, True], ids=["cpu", "accelerator"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 60), (5, 768)])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_value_and_gradients(device, dtype, rows, width, fused, monkeypatch):
    if fused:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    generator = torch.Generator().manual_seed(width)
    x = (torch.randn(rows, width, generator=generator) * torch.arange(1, rows + 1)[:, None]).to(device, dtype)
    weight = (1 + torch.randn(width, generator=generator) / 4).to(device, dtype)
    grad = torch.randn(rows, width, generator=generator).to(device, dtype)
    wide = [leaf.double().cpu().requires_grad_() for leaf in (x, weight)]
    wanted = exact(*wide)
    wanted.backward(grad.double().cpu())
    x.requires_grad_(), weight.requires_grad_()
    out = rms_norm(x, weight, EPS)
    out.backward(grad)
    assert out.dtype == dtype
    pairs = ((out.detach(), wanted.detach()), (x.grad, wide[0].grad), (weight.grad, wide[1].grad))
    for found, right in pairs:
        assert found is not None and right is not None and found.dtype == dtype
        error = (found.double().cpu() - right).abs().max() / right.abs().max().clamp(min=1)
        assert float(error) <= TOLERANCE[dtype]


def test_no_rows():
    x, weight = torch.empty(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 8)
    assert weight.grad is not None and weight.grad.tolist() == [0.0] * 8


@pytest.mark.parametrize("trained", [0, 1])
def test_gradient_of_one_input_alone(trained):
    leaves = [torch.randn(4, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)]
    leaves[trained].requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: rms_norm(*inputs, EPS), leaves)


def test_backward_keeps_the_input_and_one_number_per_row():
    x, weight = (
        torch.randn(50, 64).bfloat16().requires_grad_(),
        torch.ones(64, dtype=torch.bfloat16, requires_grad=True),
    )
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rms_norm(x, weight, EPS)
    sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in kept}
    del sizes[x.data_ptr()], sizes[weight.data_ptr()]
    assert list(sizes.values()) == [50 * 4]


def test_on_the_cpu_the_quotient_is_rounded_before_it_is_weighted():
    """As the released code and Llama's have it, so that exports agree to the bit."""
    x, weight = torch.randn(20, 64).bfloat16(), torch.randn(64).bfloat16()
    wide = x.float()
    quotient = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    assert torch.equal(rms_norm(x, weight, EPS), weight * quotient.bfloat16())

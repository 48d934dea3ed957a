"""Rotary embeddings against complex numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from moepp.ops import rotate

Tensor = torch.Tensor
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1.6e-2}


def exact(x: Tensor, angle: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [2, 6, 64])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_value_and_gradient(device, dtype, size, batch):
    """Angles of every sequence or of all, heads that lie apart as attention splits them."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(3, 5, 2, size, generator=generator).to(device, dtype).transpose(1, 2).requires_grad_()
    grad = torch.randn(3, 2, 5, size, generator=generator).to(device, dtype)
    angle = 3 * torch.randn(batch, 1, 5, size // 2, generator=generator, dtype=torch.float64)
    cos, sin = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
    out = rotate(x, cos, sin)
    out.backward(grad)
    wide = x.detach().double().cpu().requires_grad_()
    wanted = exact(wide, angle)
    wanted.backward(grad.double().cpu())
    assert out.dtype == dtype and out.stride() == x.stride()
    for found, right in ((out.detach(), wanted.detach()), (x.grad, wide.grad)):
        assert found is not None and right is not None
        error = (found.double().cpu() - right).abs().max() / right.abs().max().clamp(min=1)
        assert float(error) <= TOLERANCE[dtype]


def test_it_keeps_the_angles_alone():
    x, angle = torch.randn(2, 4, 5, 8, requires_grad=True), torch.randn(1, 1, 5, 4)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rotate(x, angle.cos(), angle.sin())
    assert [tuple(tensor.shape) for tensor in kept] == [(1, 1, 5, 4)] * 2

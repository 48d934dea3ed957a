"""What tests of Triton's kernels share: inputs, and the comparison with float64."""

from __future__ import annotations

import torch

from tests.devices import DEVICES

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2}  # the interpreter cuts bfloat16 off where devices round
DEVICE = DEVICES[-1]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_close(observed: Tensor | None, wanted: Tensor | None, dtype: torch.dtype, name: str) -> None:
    assert observed is not None and wanted is not None and observed.shape == wanted.shape, name
    error = (observed.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1)
    assert float(error) <= TOLERANCE[dtype], f"{name}: {float(error):.1e}"

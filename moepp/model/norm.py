"""Root-mean-square layer normalisation (arXiv 1910.07467). Letters: D width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moepp.ops import rms_norm


class RMSNorm(nn.Module):
    """``weight * (x / sqrt(mean(x^2) + eps))``, see :func:`moepp.ops.rms_norm`."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x_D: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return rms_norm(x_D, self.weight, self.eps)

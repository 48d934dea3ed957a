"""Root-mean-square layer normalisation (arXiv 1910.07467). Letters: D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``weight * (x / sqrt(mean(x^2) + eps))``: the quotient in fp32, then rounded to the dtype of ``x``."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x_D: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        wide_D = x_D.to(torch.promote_types(x_D.dtype, torch.float32))
        return self.weight * F.rms_norm(wide_D, wide_D.shape[-1:], eps=self.eps).to(x_D.dtype)

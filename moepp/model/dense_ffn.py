"""The dense feed-forward block of the layers between MoE layers. Letters: D width, F FFN width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moepp.model.linear import Linear


class DenseFFN(nn.Module):
    """SwiGLU without biases (arXiv 2002.05202): ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, ffn_hidden_size)
        self.up_proj = Linear(hidden_size, ffn_hidden_size)
        self.down_proj = Linear(ffn_hidden_size, hidden_size)

    def forward(self, x_D: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x_D)) * self.up_proj(x_D))

"""An expert kind with parameters: E(x) = s * x, s in R^D, for every expert one of its own."""

import torch
from torch import Tensor, nn

from moepp.moe.experts import ExpertKind
from moepp.registry import EXPERT_KINDS


@EXPERT_KINDS.register("scale")
class Scale(ExpertKind):
    """Scale each feature of a token."""

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__(num_experts, hidden_size)
        self.factor = nn.Parameter(torch.ones(num_experts, hidden_size))  # [Z, D]

    def init(self, name: str) -> float:
        return 1.0  # at first a copy expert; without this method N(0, model.init_std)

    def forward(self, x_TD: Tensor, gates_TZ: Tensor) -> Tensor:
        return (gates_TZ.to(x_TD.dtype) @ self.factor) * x_TD

    def flops_per_token(self) -> float:
        return 2.0 * self.num_experts * self.hidden_size  # gates @ factor

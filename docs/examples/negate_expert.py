"""An expert kind without parameters: E(x) = -x."""

from torch import Tensor

from moepp.moe.experts import ExpertKind
from moepp.registry import EXPERT_KINDS


@EXPERT_KINDS.register("negate")
class Negate(ExpertKind):
    """Change the sign of a token."""

    def forward(self, x_TD: Tensor, gates_TZ: Tensor) -> Tensor:
        return -gates_TZ.sum(dim=1, keepdim=True).to(x_TD.dtype) * x_TD

    def flops_per_token(self) -> float:
        return 0.0  # no matrix product

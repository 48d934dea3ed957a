"""A linear map without bias."""

from __future__ import annotations

from torch import Tensor, nn

from moepp.ops import linear


class Linear(nn.Linear):
    """``nn.Linear`` without bias; on CPUs that cannot multiply bfloat16 the product is float32's, rounded."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """[..., D] -> [..., N]."""
        return linear(input, self.weight)

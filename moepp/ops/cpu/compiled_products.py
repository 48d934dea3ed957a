"""What both kinds of compiled experts share: the kernels for their weights' type, and the weights' widths."""

from __future__ import annotations

from torch import Tensor

from moepp.ops.backend import cpu_kernels
from moepp.ops.expert_loop import ChunkProducts


class CompiledProducts(ChunkProducts):
    """Products by compiled kernels, which store gate and up in an order of their own."""

    def __init__(self, gate_up_EGD: Tensor, down_EDF: Tensor) -> None:
        super().__init__(gate_up_EGD, down_EDF)
        kernels = cpu_kernels(down_EDF)
        assert kernels is not None
        self._kernels, (_, self._width_D, self._width_F) = kernels, down_EDF.shape

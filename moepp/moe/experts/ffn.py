"""The FFN experts of one rank: SwiGLU, no bias, weights stacked over experts.

Shapes: R rows sorted by expert, D width, F expert width, G = 2F, E local experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moepp import ops
from moepp.config import MoEConfig


class FFNExperts(nn.Module):
    """``down(silu(gate(x)) * up(x))`` for each of ``num_local_experts`` experts.

    Parameters: ``gate_up_proj`` [E, 2F, D] (rows 0..F-1 gate, F..2F-1 up) and ``down_proj`` [E, D, F].
    With ``cfg.expert_chunk_rows`` = C no more than C rows of hidden activations exist at a time: nothing of them is
    stored, and backward computes them again.
    """

    def __init__(self, cfg: MoEConfig, hidden_size: int, num_local_experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_local_experts, 2 * cfg.ffn_hidden_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_local_experts, hidden_size, cfg.ffn_hidden_size))
        self.chunk_rows = cfg.expert_chunk_rows

    def weights(self, num_chunks: int) -> list[tuple[Tensor, Tensor]]:
        """``gate_up_proj`` and ``down_proj`` of each of ``num_chunks`` equal chunks of the experts."""
        if num_chunks == 1:
            return [(self.gate_up_proj, self.down_proj)]
        size = len(self.down_proj) // num_chunks
        return list(zip(self.gate_up_proj.split(size), self.down_proj.split(size), strict=True))

    def takes_device_counts(self, rows_RD: Tensor) -> bool:
        """Return whether :meth:`forward` reads the row counts of rows like these on the device."""
        width = self.down_proj.shape[2]
        return ops.takes_device_counts(rows_RD.device, rows_RD.dtype, rows_RD.shape[1], width, self.chunk_rows)

    def forward(
        self,
        rows_RD: Tensor,
        counts_E: Tensor,
        weights: tuple[Tensor, Tensor] | None = None,
        host_counts: list[int] | None = None,
    ) -> Tensor:
        """Return outputs [R, D] of rows [R, D] sorted by expert.

        Args:
            rows_RD: rows of all local experts, or of a chunk of them.
            counts_E: rows of each of these experts, int64, summing to R (see :func:`moepp.ops.grouped_swiglu`).
            weights: of the chunk, from :meth:`weights`.
            host_counts: ``counts_E`` where the host knows them already.
        """
        weights = weights if weights is not None else (self.gate_up_proj, self.down_proj)
        return ops.grouped_swiglu(rows_RD, counts_E, *weights, self.chunk_rows, host_counts)

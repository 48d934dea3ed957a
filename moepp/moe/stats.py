"""What a layer reports of one call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MoEStats:
    """Statistics of one call, detached tensors on the layer's device; for T = 0 the fractions are 0.

    ``share_Z`` and ``load_E`` are the router's choices before capacity drops; ``ffn_per_token`` and
    ``ffn_assignments`` count what is computed, after drops.
    """

    kinds: tuple[str, ...]  # the expert kinds, in the order of experts: ffn, constant, copy, zero, registered ones
    share_Z: Tensor  # choices of each kind / (K·T); they sum to 1
    ffn_per_token: Tensor  # assignments to FFN experts that are computed, per token
    drop_fraction: Tensor  # dropped assignments of any kind / (K·T)
    load_E: Tensor  # choices of each expert
    num_tokens: Tensor  # T
    ffn_assignments: Tensor  # assignments to FFN experts computed for this rank's tokens
    remote_assignments: Tensor  # of those, the ones whose expert lives on another rank
    balance_loss: Tensor  # Eq. 7, not multiplied by its weight
    z_loss: Tensor  # not multiplied by its weight; 0 where that is 0
    observation: Tensor | None = None  # see moepp.moe.observation; None: the layer was not asked for it

    def share(self, kind: str) -> Tensor:
        """Return the share of the choices that went to experts of this kind."""
        return self.share_Z[self.kinds.index(kind)]

    @property
    def share_ffn(self) -> Tensor:
        """Share of FFN experts."""
        return self.share("ffn")

    @property
    def share_constant(self) -> Tensor:
        """Share of constant experts."""
        return self.share("constant")

    @property
    def share_copy(self) -> Tensor:
        """Share of copy experts."""
        return self.share("copy")

    @property
    def share_zero(self) -> Tensor:
        """Share of zero experts."""
        return self.share("zero")

"""Auxiliary losses and statistics of all MoE layers of a model at once, with one all-reduce behind them.

A layer hands over what its routing left behind; whoever called the layers makes losses and statistics of it when no
layer has to wait for them any more.

Shapes: T tokens of this rank, E = N experts of every kind, L layers, Z expert kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp.config import MoEConfig
from moepp.distributed import comm
from moepp.distributed.sequence import SequenceParallel
from moepp.moe.losses import balance_loss
from moepp.moe.observation import RouterCall, observe
from moepp.moe.parallel import ExpertParallel
from moepp.moe.stats import MoEStats


@dataclass(frozen=True)
class RoutingRecord:
    """What one call of a layer leaves behind for its losses and statistics.

    Attributes:
        probs_TE: scores of all experts, differentiable.
        load_E: choices of each expert by this rank's tokens, before drops, int64.
        z_loss: scalar, differentiable, without its weight; None where that is 0.
        ffn_counts_E: assignments that each FFN expert computes for this rank's tokens, int64.
        num_dropped: dropped assignments of any kind, scalar int64; None: capacity was not applied.
        remote_assignments: of the computed ones, those whose expert lives on another rank.
        call: of the router, for :mod:`moepp.moe.observation`; None: nobody looks at it.
    """

    probs_TE: Tensor
    load_E: Tensor
    z_loss: Tensor | None
    ffn_counts_E: Tensor
    num_dropped: Tensor | None
    remote_assignments: int
    call: RouterCall | None = None


@dataclass(frozen=True)
class PendingSummary:
    """Losses and statistics of some layers, whose counts may be on their way through the ranks."""

    records: Sequence[RoutingRecord]
    cfg: MoEConfig
    load_LE: Tensor
    counts_LC: Tensor  # choices of each expert, and tokens: of all ranks once they have arrived
    selection_share_LE: Tensor | None
    pending: comm.Pending | None

    def finish(self) -> tuple[list[Tensor], list[MoEStats]]:
        """Wait for the counts; return each layer's auxiliary loss (weighted, scalar) and statistics."""
        if self.pending is not None:
            self.pending.wait()
        share_LE = self.selection_share_LE
        if share_LE is None:
            counts_LC = self.counts_LC.to(self.records[0].probs_TE.dtype)
            share_LE = counts_LC[:, :-1] / counts_LC[:, -1:].clamp(min=1)
        cfg, records = self.cfg, self.records
        balances_L = torch.stack(
            [
                balance_loss(probs_TE=record.probs_TE, selection_share_E=share_E, cfg=cfg)
                for record, share_E in zip(records, share_LE.unbind(), strict=True)
            ]
        )
        losses_L = cfg.balance_loss_weight * balances_L
        if z_losses := [record.z_loss for record in records if record.z_loss is not None]:
            losses_L = losses_L + cfg.z_loss_weight * torch.stack(z_losses)
        return list(losses_L.unbind()), self._stats(balances_L)

    @torch.no_grad()
    def _stats(self, balances_L: Tensor) -> list[MoEStats]:
        records, slices = self.records, self.cfg.kind_slices
        num_layers, num_tokens = len(records), records[0].probs_TE.shape[0]
        num_assignments = max(num_tokens * self.cfg.top_k, 1)
        load_LE = self.load_LE.to(torch.float32)
        share_LZ = torch.stack([load_LE[:, experts].sum(1) for experts in slices.values()], dim=1) / num_assignments
        ffn_L = torch.stack([record.ffn_counts_E for record in records]).sum(1).to(torch.float32)
        dropped = [record.num_dropped for record in records if record.num_dropped is not None]
        dropped_L = torch.stack(dropped) / num_assignments if dropped else load_LE.new_zeros(num_layers)
        zero = load_LE.new_zeros(())
        calls = [record.call for record in records if record.call is not None]
        observations = iter(observe(calls) if calls else ())
        per_token_L, tokens_L = ffn_L / max(num_tokens, 1), load_LE.new_full((num_layers,), num_tokens)
        return [
            MoEStats(
                kinds=tuple(slices),
                share_Z=share_LZ[row],
                ffn_per_token=per_token_L[row],
                drop_fraction=dropped_L[row],
                load_E=load_LE[row],
                num_tokens=tokens_L[row],
                ffn_assignments=ffn_L[row],
                remote_assignments=load_LE.new_full((), count) if (count := record.remote_assignments) else zero,
                balance_loss=balances_L[row].detach(),
                z_loss=zero if record.z_loss is None else record.z_loss.detach(),
                observation=None if record.call is None else next(observations),
            )
            for row, record in enumerate(records)
        ]


def start_summary(
    records: Sequence[RoutingRecord],
    cfg: MoEConfig,
    training: bool,
    parallel: ExpertParallel,
    sequence: SequenceParallel,
    selection_share_LE: Tensor | None = None,
) -> PendingSummary:
    """Start the all-reduce of all layers' counts, if there is one; nothing waits for it before ``finish()``.

    f_i of the balance loss counts the tokens of the scope that ``cfg`` names, or of this model's sequences: each of
    those ranks must call this, with as many layers.

    Args:
        records: of each layer, at least one, all of the same tokens.
        cfg: of the layers.
        training: whether the layers are in training mode; in evaluation only whole sequences are counted.
        parallel: has the ranks of the scope, and counts the bytes.
        sequence: has the ranks that share a sequence.
        selection_share_LE: f_i of every layer where it was counted elsewhere: nothing is reduced.
    """
    load_LE = torch.stack([record.load_E for record in records])
    counts_LC = F.pad(load_LE, (0, 1), value=records[0].probs_TE.shape[0])
    pending = None
    if selection_share_LE is None and training and cfg.balance_loss_scope != "micro_batch":
        pending = comm.start_all_reduce_sum(counts_LC, parallel.balance_group, parallel.stats)
    elif selection_share_LE is None and sequence.size > 1:
        pending = comm.start_all_reduce_sum(counts_LC, sequence.replica, parallel.stats)
    return PendingSummary(records, cfg, load_LE, counts_LC, selection_share_LE, pending)

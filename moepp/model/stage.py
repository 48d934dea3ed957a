"""One stage of a pipeline: some layers of the model, with the embedding before the first and the loss after the last.

What goes from stage to stage is what goes from layer to layer: the hidden states, and the router logits that the next
MoE layer's gating residual adds to its own (MoE++, arXiv 2410.07348, Eq. 6). Both carry gradients back.

Letters: B sequences of a micro-batch, S sequence, s the part of it that this rank holds, T = B·s tokens, D width,
E experts of every kind, L MoE layers of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moepp.config import ModelConfig
from moepp.model.transformer import LayersOutput, Transformer
from moepp.moe import MoEStats


class AddAuxLoss(torch.autograd.Function):
    """Let an auxiliary loss take part in a backward that begins at the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, aux_loss: Tensor, scale: float) -> Tensor:
        """Return ``hidden`` as it is."""
        ctx.scale, ctx.dtype = scale, aux_loss.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Give ``aux_loss`` the gradient that it would have as a summand of the loss, which is scaled by ``scale``."""
        return grad, torch.full((), ctx.scale, dtype=ctx.dtype, device=grad.device), None


@dataclass(frozen=True)
class StageResult:
    """What a stage found for one micro-batch, detached.

    Attributes:
        stats: of its MoE layers, first layer first.
        aux_loss: sum of their auxiliary losses, already weighted; scalar, fp32.
        ce_sum: cross-entropy in nats, summed over this rank's counted tokens; 0 before the last stage.
        num_tokens: how many those are; 0 before the last stage.
    """

    stats: tuple[MoEStats, ...]
    aux_loss: Tensor
    ce_sum: Tensor
    num_tokens: Tensor


class Stage(nn.Module):
    """Consecutive layers of the model as ``torch.distributed.pipelining`` runs them.

    Args:
        model: holds the layers, and the embedding or the head where the stage is the first or the last.
        layers: their indices.
        loss_scale: factor of every loss in backward.

    Attributes:
        results: one entry per call, to be taken by whoever runs the schedule.
        selection_share_LE: f_i of every MoE layer of the model where it was counted elsewhere; None: counted here.
    """

    def __init__(self, model: Transformer, layers: range, loss_scale: float) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.is_first = layers.start == 0
        self.is_last = layers.stop == model.cfg.num_layers
        self.receives_logits = logits_cross(model.cfg, layers.start)
        self.sends_logits = logits_cross(model.cfg, layers.stop)
        self.loss_scale = loss_scale
        self.results: list[StageResult] = []
        self.selection_share_LE: Tensor | None = None

    def forward(
        self, x: Tensor, prev_logits_TE: Tensor | None = None, *, input_ids_BS: Tensor, labels_BS: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Run the stage on one micro-batch.

        Args:
            x: hidden states [B, s, D] of the stage before; not looked at in the first stage.
            prev_logits_TE: [T, E] fp32 router logits of the last MoE layer so far, if they cross the border.
            input_ids_BS: [B, S] int64, whole sequences: attention looks at them in every stage.
            labels_BS: [B, S] int64; None: no loss is wanted.

        Returns:
            ``(hidden, router logits)`` or ``(hidden,)`` for the next stage; from the last the scaled loss alone.
        """
        args = x, prev_logits_TE, input_ids_BS, labels_BS
        if self.is_first or self.is_last:
            return self.model.run_as_forward(self._run, *args)
        return self._run(*args)

    def _run(
        self, x: Tensor, prev_logits_TE: Tensor | None, input_ids_BS: Tensor, labels_BS: Tensor | None
    ) -> tuple[Tensor, ...]:
        model = self.model
        hidden_BSD = model.embed(input_ids_BS) if self.is_first else x
        inputs = model.attention_inputs(input_ids_BS, hidden_BSD.dtype)
        out = model.run_layers(self.layers, hidden_BSD, inputs, prev_logits_TE, self.selection_share_LE)
        if self.is_last:
            return (self._finish(out, labels_BS),)
        self._record(out)
        hidden_BSD = AddAuxLoss.apply(out.hidden, out.aux_loss, self.loss_scale)
        if not self.sends_logits:
            return (hidden_BSD,)
        assert out.router_logits is not None
        return hidden_BSD, out.router_logits.view_as(out.router_logits)

    def _finish(self, out: LayersOutput, labels_BS: Tensor | None) -> Tensor:
        """Return the scaled loss of the micro-batch; scalar."""
        if labels_BS is None:
            self._record(out)
            return out.aux_loss
        ce_sum, num_tokens = self.model.cross_entropy(self.model.norm(out.hidden), labels_BS)
        self._record(out, ce_sum, num_tokens)  # waits for the counts, which have crossed the ranks meanwhile
        return (ce_sum / num_tokens + out.aux_loss) * self.loss_scale

    def _record(self, out: LayersOutput, ce_sum: Tensor | None = None, num_tokens: Tensor | None = None) -> None:
        zero = torch.zeros((), dtype=torch.float32, device=out.hidden.device)
        self.results.append(
            StageResult(
                out.stats,
                out.aux_loss.detach(),
                zero if ce_sum is None else ce_sum.detach(),
                zero if num_tokens is None else num_tokens.detach(),
            )
        )


def logits_cross(cfg: ModelConfig, border: int) -> bool:
    """Whether router logits go from layer ``border - 1`` to layer ``border`` or beyond.

    They do where gating residuals connect MoE layers on both sides.
    """
    before = any(layer < border for layer in cfg.moe_layers)
    return cfg.moe.gating_residual and before and any(layer >= border for layer in cfg.moe_layers)

"""The MoE++ layer: zero-computation experts beside FFN experts, with gating residuals (arXiv 2410.07348).

Shapes: T tokens of this rank, D width, E = N experts of every kind (order FFN, constant, copy, zero),
K experts per token, S = T·K slots, R rows that this rank's FFN experts compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moepp import comm
from moepp.config import MoEConfig
from moepp.errors import ConfigError
from moepp.moe.capacity import keep_within_capacity
from moepp.moe.dispatch import AllToAllDispatcher, FFNSlots, LocalDispatcher
from moepp.moe.ffn_experts import FFNExperts
from moepp.moe.kernels import count_experts, project, sort_slots
from moepp.moe.losses import balance_loss, router_z_loss
from moepp.moe.router import Gates, Router, compute_gates
from moepp.moe.zero_computation import ZeroComputation


@dataclass(frozen=True)
class MoEStats:
    """Statistics of one call, detached; for T = 0 the fractions are 0.

    ``share_*`` and ``load_E`` are the router's choices before capacity drops; ``ffn_per_token`` and ``ffn_slots``
    count what is computed, after drops.
    """

    ffn_per_token: Tensor  # FFN slots computed per token
    drop_fraction: Tensor  # dropped slots of any kind / (K·T)
    share_ffn: Tensor  # choices of FFN experts / (K·T); the four shares sum to 1
    share_constant: Tensor
    share_copy: Tensor
    share_zero: Tensor
    load_E: Tensor  # choices of each expert
    num_tokens: Tensor  # T
    ffn_slots: Tensor  # FFN slots computed for this rank's tokens
    remote_slots: Tensor  # of those, the ones whose expert lives on another rank
    balance_loss: Tensor  # Eq. 7, not multiplied by its weight
    z_loss: Tensor  # not multiplied by its weight


@dataclass(frozen=True)
class MoEOutput:
    """What the layer returns.

    Attributes:
        hidden: the experts' weighted sum, shaped like the input.
        router_logits: [T, N] fp32, for the next MoE layer's gating residual.
        aux_loss: balance loss and z-loss with their weights, scalar fp32, to be added to the training loss.
        stats: see :class:`MoEStats`.
    """

    hidden: Tensor
    router_logits: Tensor
    aux_loss: Tensor
    stats: MoEStats


@dataclass(frozen=True)
class Routing:
    """Where the slots go: FFN slots to the dispatcher, all others to the local expression."""

    ffn: FFNSlots
    ids_TK: Tensor
    weights_TK: Tensor  # 0 where dropped
    load_E: Tensor
    num_dropped: Tensor


class MoELayer(nn.Module):
    """A mixture-of-experts layer with zero-computation experts.

    FFN experts are sharded over ``ep_group`` (``None``: all of them here); router and zero-computation experts are
    replicated, so only slots of FFN experts cross ranks. Every rank of the group must call the layer, with any number
    of tokens (0 included). Capacity drops slots only in training mode; in eval mode routing is dropless, so that
    a token's output never depends on the other tokens.

    Args:
        cfg: the layer's experts and router.
        hidden_size: D.
        layer_index: number of this layer among the model's MoE layers, from 0; the first has no predecessor.
        ep_group: ranks that share the FFN experts.
        balance_group: ranks whose choices f_i counts when ``cfg.balance_loss_scope`` is not ``micro_batch``
            (``None``: the default process group).
        traffic: counter of the bytes that this layer sends.
        exchange_parts: the exchange in so many parts, one computed while the others travel.

    Raises:
        ConfigError: the number of FFN experts is not divisible by the size of ``ep_group``, or that of each rank not by
            ``exchange_parts``.
    """

    def __init__(
        self,
        cfg: MoEConfig,
        hidden_size: int,
        layer_index: int = 0,
        ep_group: comm.Group | None = None,
        balance_group: comm.Group | None = None,
        traffic: comm.Traffic | None = None,
        exchange_parts: int = 1,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.hidden_size = hidden_size
        self.layer_index = layer_index
        self.balance_group = balance_group
        ep_size = 1 if ep_group is None else comm.size(ep_group)
        if cfg.num_ffn_experts % ep_size:
            raise ConfigError(
                f"expert parallel size {ep_size} does not divide num_ffn_experts={cfg.num_ffn_experts}; "
                "change one of them so that every rank holds the same number of experts"
            )
        self.router = Router(cfg, hidden_size)
        self.zero_computation = ZeroComputation(cfg, hidden_size)
        self.experts = FFNExperts(cfg, hidden_size, cfg.num_ffn_experts // ep_size)
        if ep_group is None or ep_size == 1:
            self.dispatcher: LocalDispatcher | AllToAllDispatcher = LocalDispatcher(cfg.triton_kernels)
        else:
            traffic = traffic if traffic is not None else comm.Traffic()
            self.dispatcher = AllToAllDispatcher(
                ep_group, traffic, cfg.num_ffn_experts, exchange_parts, cfg.triton_kernels
            )
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """N(0, std) for every weight, N(0, 1) for the constant experts' vectors.

        A model draws its weights by name instead (:mod:`moepp.model.init`), the same for every layout.
        """
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=1.0 if name == "zero_computation.value" else std)

    def forward(
        self, x: Tensor, prev_logits_TE: Tensor | None = None, selection_share_E: Tensor | None = None
    ) -> MoEOutput:
        """Route, compute and combine.

        Args:
            x: [T, D] or [B, S, D] (T = B·S).
            prev_logits_TE: ``router_logits`` of the previous MoE layer; ``None`` in the first.
            selection_share_E: f_i of the balance loss when it was counted elsewhere; ``None``: counted here.
        """
        self._check_input(x, prev_logits_TE)
        x_TD = x.reshape(-1, self.hidden_size)
        router_input_TP, alpha_logits_TC2, x_TD = self._project(x_TD)  # x goes from use to use: see kernels.project
        logits_TE = self.router(router_input_TP, prev_logits_TE)
        gates = compute_gates(logits_TE, self.cfg)
        routing = self.select(gates)
        if self.cfg.scale_input_by_top_k:
            x_TD, alpha_logits_TC2 = x_TD * self.cfg.top_k, alpha_logits_TC2 * self.cfg.top_k
        receipt, x_TD = self.dispatcher.dispatch(x_TD, routing.ffn)  # starts the all-to-all: FFN slots only
        affine = self.zero_computation(
            x_TD, alpha_logits_TC2, routing.ids_TK, routing.weights_TK
        )  # meanwhile, no communication
        balance, z_loss, aux_loss = self._aux_losses(logits_TE, gates, routing.load_E, selection_share_E)
        stats = self._stats(gates, routing, receipt.remote_slots, balance, z_loss)
        outputs = []  # one part as a rule; of several, one is computed while the others travel
        for part, weights in zip(receipt.parts, self.experts.weights(len(receipt.parts)), strict=True):
            rows_RD = self.experts(self.dispatcher.receive(part), part.rows_per_expert, *weights)
            outputs.append(self.dispatcher.send_back(rows_RD, part))  # starts the all-to-all back
        out_TD = self.dispatcher.combine(outputs, receipt, affine)  # weighted sum per token, plus the affine part
        return MoEOutput(out_TD.view(x.shape), logits_TE, aux_loss, stats)

    def _project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x through the router's input weight and the constant experts' alpha weights, in one pass and fp32.

        Returns [T, P], [T, C, 2] and x for its next use.
        """
        weight_PD, num_constant = self.router.input_weight, self.cfg.num_constant_experts
        if num_constant:
            weight_PD = torch.cat((weight_PD, self.zero_computation.alpha_proj.flatten(0, 1)))
        projected, x_TD = project(x_TD, weight_PD)
        router_input_TP, alpha_logits = projected.tensor_split((weight_PD.shape[0] - 2 * num_constant,), dim=1)
        return router_input_TP, alpha_logits.unflatten(1, (num_constant, 2)), x_TD

    def select(self, gates: Gates) -> Routing:
        """Apply the capacity and find the slots that FFN experts compute."""
        cfg, ids_TK, weights_TK = self.cfg, gates.topk_ids_TK, gates.weights_TK
        load_E = count_experts(ids_TK.flatten(), cfg.num_experts)
        expert_TK, num_dropped = ids_TK, load_E.new_zeros(())
        if self.training and cfg.capacity_factor is not None:
            kept_TK = keep_within_capacity(ids_TK, weights_TK, cfg)
            weights_TK = weights_TK * kept_TK
            expert_TK = torch.where(kept_TK, ids_TK, cfg.num_experts)
            num_dropped = (~kept_TK).sum()
        number_TK = self.dispatcher.in_order(expert_TK)
        slots = FFNSlots(sort_slots(number_TK, cfg.num_ffn_experts), weights_TK)  # slots of other kinds are left out
        return Routing(slots, ids_TK, weights_TK, load_E, num_dropped)

    def _aux_losses(
        self, logits_TE: Tensor, gates: Gates, load_E: Tensor, selection_share_E: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        cfg = self.cfg
        if selection_share_E is None:
            counts = torch.cat((load_E, load_E.new_tensor([logits_TE.shape[0]]))).to(logits_TE.dtype)
            if cfg.balance_loss_scope != "micro_batch" and self.training:
                comm.all_reduce_sum(counts, self.balance_group)
            selection_share_E = counts[:-1] / counts[-1].clamp(min=1)
        balance = balance_loss(probs_TE=gates.probs_TE, selection_share_E=selection_share_E, cfg=cfg)
        z_loss = router_z_loss(logits_TE=logits_TE) if cfg.z_loss_weight else torch.zeros_like(balance)
        return balance, z_loss, cfg.balance_loss_weight * balance + cfg.z_loss_weight * z_loss

    @torch.no_grad()
    def _stats(self, gates: Gates, routing: Routing, remote_slots: int, balance: Tensor, z_loss: Tensor) -> MoEStats:
        num_tokens, top_k = gates.topk_ids_TK.shape
        device = routing.load_E.device
        num_slots = max(num_tokens * top_k, 1)
        load_E = routing.load_E.to(torch.float32)
        ffn_slots = routing.ffn.order.counts_E.sum().to(torch.float32)
        shares = {f"share_{kind}": load_E[i].sum() / num_slots for kind, i in self.cfg.kind_slices.items()}
        return MoEStats(
            ffn_per_token=ffn_slots / max(num_tokens, 1),
            drop_fraction=routing.num_dropped / num_slots,
            load_E=load_E,
            num_tokens=torch.tensor(float(num_tokens), device=device),
            ffn_slots=ffn_slots,
            remote_slots=torch.tensor(float(remote_slots), device=device),
            balance_loss=balance.detach(),
            z_loss=z_loss.detach(),
            **shares,
        )

    def _check_input(self, x: Tensor, prev_logits_TE: Tensor | None) -> None:
        if x.dim() not in (2, 3) or x.shape[-1] != self.hidden_size:
            raise ConfigError(
                f"MoELayer input has shape {list(x.shape)}, expected [T, {self.hidden_size}] or "
                f"[B, S, {self.hidden_size}]; pass hidden states of width hidden_size={self.hidden_size}"
            )
        expected = (x.shape[:-1].numel(), self.cfg.num_experts)
        if prev_logits_TE is not None and tuple(prev_logits_TE.shape) != expected:
            raise ConfigError(
                f"prev_logits_TE has shape {list(prev_logits_TE.shape)}, expected {list(expected)}; pass router_logits "
                "of the previous MoE layer for the same tokens"
            )

"""The MoE++ layer: zero-computation experts beside FFN experts, with gating residuals (arXiv 2410.07348).

Shapes: T tokens of this rank, D width, E = N experts of every kind (order FFN, constant, copy, zero, registered kinds),
K experts per token, Z kinds, R rows that this rank's FFN experts compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from moepp.config import MoEConfig
from moepp.distributed import comm
from moepp.distributed.sequence import SequenceParallel
from moepp.errors import ConfigError
from moepp.moe.capacity import capacities, drop_beyond_capacity
from moepp.moe.dispatch import AllToAllDispatcher, Assignments, LocalDispatcher
from moepp.moe.experts import ExpertKind, FFNExperts, ZeroComputation
from moepp.moe.gates import Gates
from moepp.moe.losses import router_z_loss
from moepp.moe.observation import remember
from moepp.moe.parallel import ExpertParallel
from moepp.moe.registered import RegisteredModule
from moepp.moe.router import Router, make_router
from moepp.moe.stats import MoEStats
from moepp.moe.summary import RoutingRecord, start_summary
from moepp.ops import count_experts, share_gradient, sort_assignments
from moepp.registry import EXPERT_KINDS, ROUTERS


def updates_after_step(cfg: MoEConfig) -> bool:
    """Return whether layers of this configuration have parts that want the load of each step."""
    kinds = (EXPERT_KINDS.get(kind) for kind, count in cfg.extra_experts.items() if count)
    return any(part.updates_after_step for part in (ROUTERS.get(cfg.router), *kinds))


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
class UnsummarizedOutput:
    """As :class:`MoEOutput`, with what losses and statistics are made of (:mod:`moepp.moe.summary`)."""

    hidden: Tensor
    router_logits: Tensor
    record: RoutingRecord


class MoELayer(nn.Module):
    """A mixture-of-experts layer with zero-computation experts.

    FFN experts are sharded over the expert-parallel group; router and zero-computation experts are replicated, so only
    assignments to FFN experts cross ranks. Every rank of the group must call the layer, with any number of tokens (0
    included). Capacity drops assignments only in training mode; in eval mode routing is dropless, so that a token's
    output never depends on the other tokens.

    Args:
        cfg: the layer's experts and router.
        hidden_size: D.
        layer_index: number of this layer among the model's MoE layers, from 0; the first has no predecessor.
        ep_group: ranks that share the FFN experts (``None``: all of them here); short for ``parallel``. Seed them
            alike: see :meth:`reset_parameters`.
        parallel: how experts are spread over ranks.
        sequence: the ranks that share sequences. They are one micro-batch: capacities and f_i count its tokens on all
            of them, so that the numbers are those of one process.

    Raises:
        ConfigError: the size of the group does not divide the number of FFN experts, or the number of chunks not the
            local experts.
    """

    def __init__(
        self,
        cfg: MoEConfig,
        hidden_size: int,
        layer_index: int = 0,
        ep_group: comm.Group | None = None,
        parallel: ExpertParallel | None = None,
        sequence: SequenceParallel | None = None,
    ) -> None:
        super().__init__()
        parallel = parallel if parallel is not None else ExpertParallel(ep_group)
        self.sequence = sequence if sequence is not None else SequenceParallel()
        self.cfg = cfg
        self.hidden_size = hidden_size
        self.layer_index = layer_index
        self.observes = False  # whether calls look closely at the router: see moepp.moe.observation
        self.parallel = parallel
        if cfg.num_ffn_experts % parallel.size:
            raise ConfigError(
                f"expert parallel size {parallel.size} does not divide num_ffn_experts={cfg.num_ffn_experts}; "
                "change one of them so that every rank holds the same number of experts"
            )
        self.router = make_router(cfg, hidden_size)
        self.zero_computation = ZeroComputation(cfg, hidden_size)
        self.experts = FFNExperts(cfg, hidden_size, cfg.num_ffn_experts // parallel.size)
        self.dispatcher: LocalDispatcher | AllToAllDispatcher = LocalDispatcher(self.experts.takes_device_counts)
        if parallel.size > 1:
            self.dispatcher = AllToAllDispatcher(parallel, cfg.num_ffn_experts)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """N(0, std) for every weight, N(0, 1) for the constant experts' vectors; registered parts may say otherwise.

        Seed every rank alike (``torch.manual_seed``): then the ranks of an expert-parallel group have one router, and
        together the experts that one process would have. A model draws its weights by name instead
        (:mod:`moepp.model.init`), the same for every layout.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("experts.") and self.parallel.size > 1:
                whole = parameter.new_empty(self.parallel.size * len(parameter), *parameter.shape[1:])
                nn.init.normal_(whole, std=std)
                parameter.data.copy_(whole.chunk(self.parallel.size)[comm.rank(self.parallel.group)])
            else:
                nn.init.normal_(parameter, std=1.0 if name == "zero_computation.value" else std)
        for module in (self.router, *self.zero_computation.children()):
            for name, parameter in module.named_parameters():
                if isinstance(module, RegisteredModule) and (value := module.init(name)) is not None:
                    nn.init.constant_(parameter, value)

    def forward(
        self,
        x: Tensor,
        prev_logits_TE: Tensor | None = None,
        selection_share_E: Tensor | None = None,
        summarize: bool = True,
    ) -> MoEOutput | UnsummarizedOutput:
        """Route, compute and combine.

        Args:
            x: [T, D] or [B, S, D] (T = B·S).
            prev_logits_TE: ``router_logits`` of the previous MoE layer; ``None`` in the first.
            selection_share_E: f_i of the balance loss when it was counted elsewhere; ``None``: counted here.
            summarize: False leaves losses and statistics to the caller, who makes those of many layers at once.
        """
        self._check_input(x, prev_logits_TE)
        x_TD = share_gradient(x.reshape(-1, self.hidden_size))
        logits_TE, gates = self.router.route(x_TD, prev_logits_TE)
        assignments = self.assign(gates, batch_size=x.shape[0] if x.dim() == 3 else 1)
        if self.cfg.scale_input_by_top_k:
            x_TD = share_gradient(x_TD * self.cfg.top_k)
        z_loss = router_z_loss(logits_TE=logits_TE) if self.cfg.z_loss_weight else None
        chunks, metadata = self.dispatcher.dispatch(x_TD, assignments)  # starts the all-to-all: FFN assignments only
        local_TD = self.zero_computation(x_TD, assignments.ids_TK, assignments.weights_TK)  # meanwhile
        outputs = []  # usually of one chunk; with several, compute overlaps communication
        for chunk, weights in zip(chunks, self.experts.weights(len(chunks)), strict=True):
            rows_RD = self.experts(self.dispatcher.receive(chunk), chunk.counts_E, weights, chunk.host_counts)
            outputs.append(self.dispatcher.send_back(rows_RD, chunk))
        out_TD = self.dispatcher.combine(outputs, metadata, local_TD)
        record = RoutingRecord(
            probs_TE=gates.probs_TE,
            load_E=assignments.load_E,
            z_loss=z_loss,
            ffn_counts_E=assignments.ffn.counts_E,
            num_dropped=assignments.num_dropped,
            remote_assignments=metadata.remote_assignments,
            call=remember(self.router, logits_TE, prev_logits_TE, gates) if self.observes else None,
        )
        out = UnsummarizedOutput(out_TD.view(x.shape), logits_TE, record)
        return self._summarize(out, selection_share_E) if summarize else out

    def assign(self, gates: Gates, batch_size: int = 1) -> Assignments:
        """Apply the capacity and find the assignments that FFN experts compute; of ``batch_size`` sequences."""
        cfg, ids_TK = self.cfg, gates.topk_ids_TK
        expert_TK, dropped_TK, load_E, max_rows = ids_TK, None, None, ids_TK.numel()
        if self.training and cfg.capacity_factor is not None:
            dropped_TK, load_E = drop_beyond_capacity(ids_TK, gates.weights_TK, cfg, self.sequence, batch_size)
            expert_TK = ids_TK.masked_fill(dropped_TK, cfg.num_experts)
            ffn_capacity, _ = capacities(cfg, ids_TK.numel() * self.sequence.size)
            max_rows = min(max_rows, cfg.num_ffn_experts * ffn_capacity)
        # Assignments of other kinds are left out: their keys are num_ffn_experts or more.
        keys_TK = self.dispatcher.sort_keys(expert_TK)
        ffn = sort_assignments(keys_TK, cfg.num_ffn_experts, cfg.num_experts + 1)
        if load_E is None and keys_TK is ids_TK and ffn.counts_X is not None:
            load_E = ffn.counts_X[:-1]
        elif load_E is None:
            load_E = count_experts(ids_TK.flatten(), cfg.num_experts)
        num_dropped = None
        if dropped_TK is not None:
            num_dropped = dropped_TK.sum() if ffn.counts_X is None else ffn.counts_X[-1]
        return Assignments(expert_TK, gates.weights_TK, ffn, load_E, num_dropped, max_rows)

    def _summarize(self, out: UnsummarizedOutput, selection_share_E: Tensor | None) -> MoEOutput:
        share_LE = None if selection_share_E is None else selection_share_E.unsqueeze(0)
        summary = start_summary([out.record], self.cfg, self.training, self.parallel, self.sequence, share_LE)
        [loss], [stats] = summary.finish()
        return MoEOutput(out.hidden, out.router_logits, loss, stats)

    def parts_updated_after_step(self) -> list[tuple[Router | ExpertKind, slice]]:
        """Return the router and the expert kinds that want the load of each step, and whose load that is."""
        children = self.zero_computation.named_children()
        kinds = [(cast(ExpertKind, part), self.cfg.kind_slices[kind]) for kind, part in children]
        return [(part, experts) for part, experts in ((self.router, slice(None)), *kinds) if part.updates_after_step]

    @torch.no_grad()
    def after_optimizer_step(self, load_E: Tensor) -> None:
        """Update the state of the parts that have one; ``load_E`` as in :meth:`Router.after_optimizer_step`."""
        for part, experts in self.parts_updated_after_step():
            part.after_optimizer_step(load_E[experts])

    def extra_repr(self) -> str:
        """Return the experts per kind and the number that each token chooses."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.cfg.expert_counts.items() if count)
        return f"{counts}; top {self.cfg.top_k}"

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
        dtype = torch.promote_types(x.dtype, torch.float32)
        if prev_logits_TE is not None and torch.promote_types(prev_logits_TE.dtype, dtype) != dtype:
            raise ConfigError(
                f"prev_logits_TE is {prev_logits_TE.dtype}, and logits of {x.dtype} tokens are {dtype}; pass "
                "router_logits of the previous MoE layer for the same tokens"
            )

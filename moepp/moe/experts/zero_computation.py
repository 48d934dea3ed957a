"""Zero-computation experts (MoE++, arXiv 2410.07348, Eqs. 3-5) and further kinds that every rank computes itself.

Zero experts discard a token, E(x) = 0; copy experts skip, E(x) = x; constant experts replace, E(x) = α1 x + α2 v with
[α1, α2] = softmax(W x). Nothing of them is permuted or sent. Further kinds are registered from outside.

Shapes: T tokens, D width, K experts per token, C constant experts, Z experts of one registered kind.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module

from moepp import ops
from moepp.config import MoEConfig
from moepp.moe.registered import RegisteredModule, require_tensor, without_side_effects
from moepp.registry import EXPERT_KINDS


class ExpertKind(RegisteredModule):
    """Base of registered expert kinds: ``@EXPERT_KINDS.register("negate")`` on a subclass.

    All experts of the kind in a layer are one object, the same on every rank. Its parameters are in checkpoints as
    ``<layer>.zero_computation.<kind>.<name>`` and are drawn from N(0, ``model.init_std``), unless :meth:`init` says
    otherwise. The kind is logged as ``routing/layer_<i>/share_<kind>``.

    Args:
        num_experts: Z; ``model.moe.extra_experts.<kind>``.
        hidden_size: D.
    """

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.num_experts, self.hidden_size = num_experts, hidden_size

    def forward(self, x_TD: Tensor, gates_TZ: Tensor) -> Tensor:
        """Return the weighted sum of these experts' outputs, ``Σ_z gates[t, z] E_z(x_t)``: [T, D] in x's dtype.

        ``x_TD`` are bf16 where a model trains in it. ``gates_TZ`` are fp32 then too (fp64 for fp64 tokens), and 0 where
        an expert was not chosen or was dropped.
        """
        raise NotImplementedError

    def after_optimizer_step(self, load_Z: Tensor) -> None:
        """Update the buffers. Called after every optimizer step that was taken, not after one that was skipped.

        Only where :attr:`updates_after_step` is set; without autograd.

        Args:
            load_Z: how often each of these experts was chosen in this step, before drops: all ranks and micro-batches,
                fp64.
        """


# A kind is an attribute of the module below, and part of names in which "experts" means sharded ones.
EXPERT_KINDS.reserve({*dir(nn.Module()), "cfg", "hidden_size", "experts"})


class ZeroComputation(nn.Module):
    """All experts of a layer that every rank computes itself.

    Parameters: ``alpha_proj`` [C, 2, D] and ``value`` [C, D] of the constant experts, and those of registered kinds.
    """

    def __init__(self, cfg: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.cfg, self.hidden_size = cfg, hidden_size
        if cfg.num_constant_experts:
            self.alpha_proj = nn.Parameter(torch.empty(cfg.num_constant_experts, 2, hidden_size))
            self.value = nn.Parameter(torch.empty(cfg.num_constant_experts, hidden_size))
        for kind, count in cfg.extra_experts.items():
            if count:
                self.add_module(kind, EXPERT_KINDS.get(kind)(count, hidden_size))

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor | None:
        """Return the weighted sum of these experts' outputs: [T, D].

        ``ids_TK`` are the chosen experts of every kind, no expert's number where dropped, and ``weights_TK`` their gate
        weights. ``None`` where the layer has zero experts alone: their sum is exactly 0.
        """
        slices = self.cfg.kind_slices
        affine, total_TD = range(slices["constant"].start, slices["copy"].stop), None
        if len(affine):
            alpha_C2D, value_CD = self._constant_parameters(x_TD)
            total_TD = ops.affine_experts(x_TD, ids_TK, weights_TK, alpha_C2D, value_CD, affine)
            if not self._forward_hooks and not module._global_forward_hooks:  # which may keep it
                ops.donate(total_TD)
        for kind, experts in self.named_children():
            gates_TZ, what = _gates_of(slices[kind], ids_TK, weights_TK), f"expert kind {kind}"
            with without_side_effects(what, x_TD, experts):
                out_TD = experts(x_TD, gates_TZ)
            out_TD = require_tensor(out_TD, what, x_TD, tuple(x_TD.shape), x_TD.dtype)
            total_TD = out_TD if total_TD is None else total_TD + out_TD
        return total_TD

    def _constant_parameters(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        if self.cfg.num_constant_experts:
            return self.alpha_proj, self.value
        return x_TD.new_empty(0, 2, self.hidden_size), x_TD.new_empty(0, self.hidden_size)


def _gates_of(experts: slice, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return the gate weight of every token for each of these experts, 0 where not chosen: [T, Z]."""
    numbers_Z = torch.arange(experts.start, experts.stop, device=ids_TK.device)
    chosen_TKZ = ids_TK.unsqueeze(-1) == numbers_Z
    return (weights_TK.unsqueeze(-1) * chosen_TKZ).sum(dim=1)

"""A closer look at what a router does: entropy, logits, and gate weights with and without the gating residual.

It is taken on the steps that are logged, not on all. All layers are looked at together: most operations are as many
whatever the number of layers.

Shapes: L layers, T tokens, E experts of every kind, K experts per token, C columns, W columns of gate weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepp import ops
from moepp.config import MoEConfig
from moepp.moe.gates import Gates, compute_gates
from moepp.moe.router import Router
from moepp.ops.constants import numbers

BINS = 20  # of a histogram of gate weights, equal parts of [0, 1]
MEANS = ("entropy", "z_loss", "logit_norm")
WITHOUT = "_without_residual"
CHOICES = ("first", "second")


def gate_names(cfg: MoEConfig) -> tuple[str, ...]:
    """Return the names of the W columns of gate weights: of each token's first and second choice.

    With gating residuals also of those that it would make in this layer without them (MoE++, arXiv 2410.07348, Fig. 6).
    """
    choices = CHOICES[: cfg.top_k]
    return choices + (tuple(f"{choice}{WITHOUT}" for choice in choices) if cfg.gating_residual else ())


def num_columns(cfg: MoEConfig) -> int:
    """C: tokens, a sum over tokens for each of :data:`MEANS`, and for each gate its sum, its square's, and a histogram.

    They are in this order: all sums of gates, all squares, all histograms.
    """
    return 1 + len(MEANS) + len(gate_names(cfg)) * (2 + BINS)


@dataclass(frozen=True)
class RouterCall:
    """What one call of a router left behind, to be looked at once all layers have been called.

    Attributes:
        cfg: of the layer.
        logits_TE: after the gating residual, before any normalisation.
        plain_TE: without the gating residual; None where there is none, or the router chooses in its own way.
        gates: made of the logits.
        plain_weights_TK: what a router that chooses in its own way gives without the gating residual.
    """

    cfg: MoEConfig
    logits_TE: Tensor
    plain_TE: Tensor | None
    gates: Gates
    plain_weights_TK: Tensor | None = None


@torch.no_grad()
def remember(router: Router, logits_TE: Tensor, prev_logits_TE: Tensor | None, gates: Gates) -> RouterCall:
    """Keep what :func:`observe` needs of a call, while the router's weights are there."""
    logits_TE = logits_TE.detach()
    if prev_logits_TE is None or router.gate_map is None:
        return RouterCall(router.cfg, logits_TE, None, gates)
    plain_TE = ops.add_linear_fp32(logits_TE, prev_logits_TE, -router.gate_map.weight)
    if type(router).choose is Router.choose:
        return RouterCall(router.cfg, logits_TE, plain_TE, gates)
    return RouterCall(router.cfg, logits_TE, None, gates, router.gates(plain_TE).weights_TK)


@torch.no_grad()
def observe(calls: Sequence[RouterCall]) -> Tensor:
    """Return sums over the tokens of each call, fp64 [L, C]; the calls are of layers of one model and the same tokens.

    - entropy: of the experts' scores, made to sum to 1, in nats.
    - z_loss: squared log of the sum of the logits' exponentials (ST-MoE, arXiv 2202.08906, Eq. 5).
    - logit_norm: Euclidean norm of a token's logits after the gating residual, before any normalisation.
    - gate weights: before capacity drops.
    """
    cfg, num_layers = calls[0].cfg, len(calls)
    logits_LTE = torch.stack([call.logits_TE for call in calls])
    probs_LTE = torch.stack([call.gates.probs_TE for call in calls])
    probs_LTE = probs_LTE / probs_LTE.sum(dim=2, keepdim=True)
    means = (
        -torch.special.xlogy(probs_LTE, probs_LTE).sum(dim=(1, 2), dtype=torch.float64),
        torch.logsumexp(logits_LTE, dim=2).square().sum(dim=1, dtype=torch.float64),
        torch.linalg.vector_norm(logits_LTE, dim=2).sum(dim=1, dtype=torch.float64),
    )
    tokens_L = means[0].new_full((num_layers,), logits_LTE.shape[1])
    choices, num_gates = CHOICES[: cfg.top_k], len(gate_names(cfg))
    columns = [[call.gates.weights_TK[:, : len(choices)] for call in calls]]
    if num_gates > len(choices):
        columns.append([_without_residual(call)[:, : len(choices)] for call in calls])
    weights_LTW = torch.cat([torch.stack(own) for own in columns], dim=2)
    bins_LTW = (weights_LTW * BINS).long().clamp(0, BINS - 1)
    bins_LTW += numbers(num_gates, bins_LTW, step=BINS)
    bins_LTW += numbers(num_layers, bins_LTW, step=num_gates * BINS)[:, None, None]
    histograms = ops.count_experts(bins_LTW.flatten(), num_layers * num_gates * BINS)
    return torch.cat(
        (
            torch.stack((tokens_L, *means), dim=1),
            weights_LTW.sum(dim=1, dtype=torch.float64),
            weights_LTW.square().sum(dim=1, dtype=torch.float64),
            histograms.view(num_layers, -1).to(torch.float64),
        ),
        dim=1,
    )


def _without_residual(call: RouterCall) -> Tensor:
    """Return the gate weights that the layer would make without its gating residual, [T, K]."""
    if call.plain_weights_TK is not None:
        return call.plain_weights_TK
    return (call.gates if call.plain_TE is None else compute_gates(call.plain_TE, call.cfg)).weights_TK

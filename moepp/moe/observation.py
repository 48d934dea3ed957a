"""A closer look at what a router does: entropy, logits, and gate weights with and without the gating residual.

It costs a few small operations and is taken on the steps that are logged, not on all.

Shapes: T tokens, E experts of every kind, K experts per token, C columns, W columns of gate weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepp import ops
from moepp.config import MoEConfig
from moepp.moe.gates import Gates, compute_gates
from moepp.moe.router import Router

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


@torch.no_grad()
def observe(router: Router, logits_TE: Tensor, prev_logits_TE: Tensor | None, gates: Gates) -> Tensor:
    """Return sums over the tokens of one call of a layer, fp64 [C].

    - entropy: of the experts' scores, made to sum to 1, in nats.
    - z_loss: squared log of the sum of the logits' exponentials (ST-MoE, arXiv 2202.08906, Eq. 5).
    - logit_norm: Euclidean norm of a token's logits after the gating residual, before any normalisation.
    - gate weights: before capacity drops. A router that chooses in its own way is not asked what it would choose
      without residuals: its columns repeat those with them.
    """
    probs_TE = gates.probs_TE / gates.probs_TE.sum(dim=1, keepdim=True)
    means = (
        -torch.special.xlogy(probs_TE, probs_TE).sum(dtype=torch.float64),
        torch.logsumexp(logits_TE, dim=1).square().sum(dtype=torch.float64),
        torch.linalg.vector_norm(logits_TE, dim=1).sum(dtype=torch.float64),
    )
    names, choices = gate_names(router.cfg), CHOICES[: router.cfg.top_k]
    weights_TW = gates.weights_TK[:, : len(choices)]
    if len(names) > len(choices):
        without_TW = weights_TW
        if prev_logits_TE is not None and router.gate_map is not None and type(router).choose is Router.choose:
            plain_TE = ops.add_linear_fp32(logits_TE, prev_logits_TE, -router.gate_map.weight)
            without_TW = compute_gates(plain_TE, router.cfg).weights_TK[:, : len(choices)]
        weights_TW = torch.cat((weights_TW, without_TW), dim=1)
    bins_TW = (weights_TW * BINS).long().clamp(0, BINS - 1)
    bins_TW += torch.arange(len(names), device=bins_TW.device) * BINS
    histogram = ops.count_experts(bins_TW.flatten(), len(names) * BINS)
    return torch.cat(
        (
            torch.stack((means[0].new_full((), len(logits_TE)), *means)),
            weights_TW.sum(dim=0, dtype=torch.float64),
            weights_TW.square().sum(dim=0, dtype=torch.float64),
            histogram.to(torch.float64),
        )
    )

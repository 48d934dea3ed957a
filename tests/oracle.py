"""Slow reference of the MoE++ layer: float64, plain loops over tokens and experts, gradients by autograd.

Written from the paper's equations (arXiv 2410.07348) and shares no code with ``moepp``: it reads the fields of an
``MoEConfig`` and nothing else. Shapes: T tokens, D width, F ffn width, N experts of all kinds, E FFN experts, K top-k.

Experts are held in full, whatever the expert parallelism: ``experts.gate_up_proj [E, 2F, D]``,
``experts.down_proj [E, D, F]``; the other parameters have the names and shapes of the layer's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Reference:
    """What the layer must give on one rank. Tensors are float64 and carry gradients."""

    hidden_TD: Tensor
    router_logits_TN: Tensor
    aux_loss: Tensor
    stats: dict[str, Any]  # the fields of MoEStats: floats, and load_E as a list
    gates: list[dict[int, float]]  # weight of each expert that a token chose, best first, before drops
    kept: set[tuple[int, int]]  # (token, expert) assignments that survive the capacities
    margin: float  # smallest gap that decided a choice or a drop; rounding below it cannot change the routing


@dataclass(frozen=True)
class _Routed:
    """The router's result for one token."""

    logits_N: Tensor  # after the gating residual
    probabilities_N: Tensor
    gates: dict[int, Tensor]  # expert -> weight, highest first
    margin: float


def kinds_of(cfg: Any) -> list[str]:
    """Names of the kinds in the order of experts; those of docs/examples come last."""
    return ["ffn", "constant", "copy", "zero", *sorted(cfg.extra_experts)]


def kind_of(cfg: Any, expert: int) -> tuple[str, int]:
    """Kind of an expert and its index within the kind; the order is FFN, constant, copy, zero, others by name."""
    for kind in kinds_of(cfg):
        count = cfg.extra_experts[kind] if kind in cfg.extra_experts else getattr(cfg, f"num_{kind}_experts")
        if expert < count:
            return kind, expert
        expert -= count
    raise IndexError(expert)


def capacity_of(cfg: Any, kind: str, tokens: int) -> int:
    """Eq. 8 on the K·T assignments of one rank, rounded up."""
    e = cfg.num_ffn_experts
    z = _num_experts(cfg) - e
    share = (cfg.tau if kind == "ffn" else 1.0) / (cfg.tau * e + z)
    assignments = cfg.capacity_factor * cfg.top_k * tokens * share
    return math.ceil(assignments - 1e-9)  # a product that is whole in exact arithmetic is not rounded up


def _route_token(cfg: Any, params: Mapping[str, Tensor], x_D: Tensor, prev_N: Tensor | None) -> _Routed:
    if cfg.router in ("linear", "bias"):
        logits = params["router.weight"] @ x_D
    else:
        logits = params["router.fc2.weight"] @ torch.tanh(params["router.fc1.weight"] @ x_D)
    if cfg.gating_residual:
        logits = logits + params["router.gate_map.weight"] @ (torch.zeros_like(logits) if prev_N is None else prev_N)
    if cfg.router == "bias":
        return _choose_with_bias(cfg, logits, params["router.bias"])
    n = len(logits)
    z = logits
    if cfg.logits_norm_std is not None:
        mean = torch.stack([logits[i] for i in range(n)]).sum() / n
        variance = torch.stack([(logits[i] - mean) ** 2 for i in range(n)]).sum() / (n - 1)
        z = logits * cfg.logits_norm_std / torch.sqrt(variance)
    exponentials = torch.exp(z - z.max().detach())
    p = exponentials / exponentials.sum()

    order = sorted(range(n), key=lambda i: (-float(z[i].detach()), i))
    chosen = order[: cfg.top_k]
    margin = float((z[chosen[-1]] - z[order[cfg.top_k]]).detach()) if cfg.top_k < n else math.inf

    if cfg.gate_normalization == "topk_softmax":
        total = sum(exponentials[i] for i in chosen)
        gates = {i: exponentials[i] / total for i in chosen}
    elif cfg.gate_normalization == "none":
        gates = {i: p[i] for i in chosen}
    elif cfg.gate_normalization == "topk_sigmoid":
        gates = {i: 1 / (1 + torch.exp(-z[i])) for i in chosen}
    else:
        alive = [i for i in chosen if kind_of(cfg, i)[0] != "zero"]
        total = sum((p[i] for i in alive), torch.zeros((), dtype=p.dtype))
        gates = {i: p[i] / total if i in alive else torch.zeros_like(p[i]) for i in chosen}
    return _Routed(logits, p, gates, margin)


def _choose_with_bias(cfg: Any, logits_N: Tensor, bias_N: Tensor) -> _Routed:
    """DeepSeek-V3 (arXiv 2412.19437), Eqs. 13, 15 and 16."""
    scores = [1 / (1 + torch.exp(-logit)) for logit in logits_N]
    rank_by = [float(score.detach()) + float(bias) for score, bias in zip(scores, bias_N, strict=True)]
    order = sorted(range(len(scores)), key=lambda i: (-rank_by[i], i))
    chosen, rest = order[: cfg.top_k], order[cfg.top_k :]
    total = sum(scores[i] for i in chosen)
    margin = rank_by[chosen[-1]] - rank_by[rest[0]] if rest else math.inf
    everything = torch.stack(scores)
    return _Routed(logits_N, everything / everything.sum(), {i: scores[i] / total for i in chosen}, margin)


def _expert_output(cfg: Any, params: Mapping[str, Tensor], expert: int, x_D: Tensor) -> Tensor:
    kind, index = kind_of(cfg, expert)
    if cfg.scale_input_by_top_k:
        x_D = x_D * cfg.top_k
    if kind == "ffn":
        gate_up = params["experts.gate_up_proj"][index] @ x_D
        gate, up = gate_up[: cfg.ffn_hidden_size], gate_up[cfg.ffn_hidden_size :]
        return params["experts.down_proj"][index] @ (gate / (1 + torch.exp(-gate)) * up)
    if kind == "constant":
        a, b = params["zero_computation.alpha_proj"][index] @ x_D
        alpha = 1 / (1 + torch.exp(b - a))
        return alpha * x_D + (1 - alpha) * params["zero_computation.value"][index]
    if kind == "scale":
        return torch.stack([s * x for s, x in zip(params["zero_computation.scale.factor"][index], x_D, strict=True)])
    return {"copy": x_D, "negate": -x_D, "zero": torch.zeros_like(x_D)}[kind]


def _keep(cfg: Any, routed: list[_Routed], training: bool) -> tuple[set[tuple[int, int]], float]:
    """Assignments that fit the capacities, and the smallest gap of gate weights at a capacity's edge."""
    kept: set[tuple[int, int]] = set()
    margin = math.inf
    for expert in range(_num_experts(cfg)):
        queue = [(float(r.gates[expert].detach()), t) for t, r in enumerate(routed) if expert in r.gates]
        if training and cfg.capacity_factor is not None:
            room = capacity_of(cfg, kind_of(cfg, expert)[0], len(routed))
            if cfg.drop_policy == "weight":
                queue.sort(key=lambda entry: (-entry[0], entry[1]))
                if room < len(queue) and queue[room - 1][0] != queue[room][0]:  # exact ties: earlier token first
                    margin = min(margin, queue[room - 1][0] - queue[room][0])
            queue = queue[:room]
        kept |= {(t, expert) for _, t in queue}
    return kept, margin


def _num_experts(cfg: Any) -> int:
    plain = cfg.num_ffn_experts + cfg.num_constant_experts + cfg.num_copy_experts + cfg.num_zero_experts
    return plain + sum(cfg.extra_experts.values())


def _balance_loss(cfg: Any, routed: list[_Routed], fraction_N: Sequence[float]) -> Tensor:
    """Eq. 7 with f given and P the mean probability over this rank's tokens."""
    loss = torch.zeros((), dtype=torch.float64)
    n = _num_experts(cfg)
    for expert in range(n if routed else 0):
        eta = 1.0 if kind_of(cfg, expert)[0] == "ffn" else cfg.tau
        if cfg.balance_rule == "ffn_only":
            eta = float(kind_of(cfg, expert)[0] == "ffn")
        mean_probability = sum(r.probabilities_N[expert] for r in routed) / len(routed)
        loss = loss + eta * fraction_N[expert] * mean_probability
    return loss * n / cfg.top_k if cfg.balance_loss_switch_scale else loss


def _statistics(
    cfg: Any, routed: list[_Routed], kept: set[tuple[int, int]], ep_rank: int, ep_size: int
) -> dict[str, Any]:
    tokens = len(routed)
    assignments = max(1, cfg.top_k * tokens)
    per_device = cfg.num_ffn_experts // ep_size
    load = [sum(expert in r.gates for r in routed) for expert in range(_num_experts(cfg))]
    kept_ffn = [expert for _, expert in kept if kind_of(cfg, expert)[0] == "ffn"]
    stats: dict[str, Any] = {
        f"share_{kind}": sum(load[e] for e in range(len(load)) if kind_of(cfg, e)[0] == kind) / assignments
        for kind in kinds_of(cfg)
    }
    return stats | {
        "ffn_per_token": len(kept_ffn) / max(1, tokens),
        "drop_fraction": (cfg.top_k * tokens - len(kept)) / assignments,
        "load_E": load,
        "num_tokens": tokens,
        "ffn_assignments": len(kept_ffn),
        "remote_assignments": sum(expert // per_device != ep_rank for expert in kept_ffn),
    }


def moe_reference(
    cfg: Any,
    params: Mapping[str, Tensor],
    x_by_rank: Sequence[Tensor],
    prev_by_rank: Sequence[Tensor | None] | None = None,
    *,
    training: bool = True,
    ep_size: int = 1,
    selection_share: Sequence[float] | None = None,
) -> list[Reference]:
    """The layer on every rank: ``x_by_rank`` holds each rank's own tokens [T_rank, D], float64.

    Capacities and P are per rank of origin. f of the balance loss counts the rank's own tokens; all ranks' tokens
    (divided by all tokens) when training unless ``cfg.balance_loss_scope`` is "micro_batch"; or it is
    ``selection_share`` [N], if given.
    EP groups are consecutive ranks. ``params`` are the full layer's; gradients flow into them and the inputs.
    """
    prev_by_rank = prev_by_rank or [None] * len(x_by_rank)
    routed_by_rank = [
        [_route_token(cfg, params, x_TD[t], None if prev is None else prev[t]) for t in range(len(x_TD))]
        for x_TD, prev in zip(x_by_rank, prev_by_rank, strict=True)
    ]
    everyone = [r for routed in routed_by_rank for r in routed]
    results = []
    for rank, (x_TD, routed) in enumerate(zip(x_by_rank, routed_by_rank, strict=True)):
        kept, margin = _keep(cfg, routed, training)
        rows = []
        for t, r in enumerate(routed):
            row = torch.zeros_like(x_TD[t])
            for expert, gate in r.gates.items():
                if (t, expert) in kept:
                    row = row + gate * _expert_output(cfg, params, expert, x_TD[t])
            rows.append(row)
        counted = everyone if training and cfg.balance_loss_scope != "micro_batch" else routed
        shares = [sum(e in r.gates for r in counted) / max(1, len(counted)) for e in range(_num_experts(cfg))]
        balance_loss = _balance_loss(cfg, routed, shares if selection_share is None else selection_share)
        z_terms = [torch.log(torch.exp(r.logits_N - r.logits_N.max()).sum()) + r.logits_N.max() for r in routed]
        z_loss = sum((term**2 for term in z_terms), torch.zeros((), dtype=x_TD.dtype)) / max(1, len(routed))
        stats = _statistics(cfg, routed, kept, rank % ep_size, ep_size)
        results.append(
            Reference(
                hidden_TD=torch.stack(rows) if rows else x_TD * 0,
                router_logits_TN=torch.stack([r.logits_N for r in routed])
                if routed
                else x_TD.new_zeros(0, _num_experts(cfg)),
                aux_loss=cfg.balance_loss_weight * balance_loss + cfg.z_loss_weight * z_loss,
                stats=stats | {"balance_loss": float(balance_loss.detach()), "z_loss": float(z_loss.detach())},
                gates=[{e: float(w.detach()) for e, w in r.gates.items()} for r in routed],
                kept=kept,
                margin=min([margin, *(r.margin for r in routed)]),
            )
        )
    return results

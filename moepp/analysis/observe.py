"""What a model does with given tokens: the experts that each token chooses in each layer, and its loss.

Letters: N sequences, S tokens of each, L MoE layers, T tokens of a batch, E experts of every kind, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moepp.analysis.token_view import TokenView
from moepp.config import MoEConfig
from moepp.distributed.device import to_device
from moepp.errors import ConfigError, DataError
from moepp.evaluation.scoring import token_losses
from moepp.model.transformer import Transformer
from moepp.moe import MoELayer
from moepp.moe.router import Router

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Observed:
    """Routing and loss of every token.

    Attributes:
        input_ids_NS: the tokens.
        losses_NS: cross-entropy of the token that follows, nats.
        ids_LNSK: chosen experts, best first.
        weights_LNSK: their gate weights.
        entropy_LNS: of the router's probabilities, nats.
        cfg: the layers' experts.
        layers: index of the transformer layer of each MoE layer; () where all layers are MoE layers.
    """

    input_ids_NS: np.ndarray
    losses_NS: np.ndarray
    ids_LNSK: np.ndarray
    weights_LNSK: np.ndarray
    entropy_LNS: np.ndarray
    cfg: MoEConfig
    layers: tuple[int, ...] = ()

    @property
    def ffn_NS(self) -> np.ndarray:
        """FFN experts per token, mean over layers."""
        return (self.ids_LNSK < self.cfg.num_ffn_experts).sum(axis=-1).mean(axis=0)

    @property
    def view(self) -> TokenView:
        """What tables are made of."""
        shares = {kind: self.share(kind) for kind, count in self.cfg.expert_counts.items() if count}
        return TokenView(self.input_ids_NS, self.losses_NS, self.ffn_NS, shares, self.layers)

    def share(self, kind: str) -> np.ndarray:
        """Return the share of a layer's choices that are of this kind, [L]."""
        experts = self.cfg.kind_slices[kind]
        chosen = (self.ids_LNSK >= experts.start) & (self.ids_LNSK < experts.stop)
        return chosen.reshape(len(chosen), -1).mean(axis=1)


def pool_observed(seen: Sequence[Observed]) -> Observed:
    """Return several as one; sequences are equally long."""
    if len(seen) == 1:
        return seen[0]
    by_sequence = {"input_ids_NS": 0, "losses_NS": 0, "ids_LNSK": 1, "weights_LNSK": 1, "entropy_LNS": 1}
    joined = {name: np.concatenate([getattr(one, name) for one in seen], axis) for name, axis in by_sequence.items()}
    return Observed(**joined, cfg=seen[0].cfg, layers=seen[0].layers)


@dataclass(frozen=True)
class Change:
    """A deliberate change of the model's routing.

    Attributes:
        residuals: False cuts the gating residuals: each router sees its own token alone.
        swap_share: share of tokens whose choices are swapped between FFN and zero-computation experts, in every layer.
        seed: draws those tokens.
    """

    residuals: bool = True
    swap_share: float = 0.0
    seed: int = 0


@torch.no_grad()
def observe(model: Transformer, tokens_NX: np.ndarray, change: Change = Change()) -> Observed:
    """Read sequences of S + 1 tokens; the model must be whole (no expert parallelism) and in eval mode.

    Raises:
        ConfigError: the model has no MoE layer, or ``change`` asks for what it does not have.
        DataError: no sequence, or one of less than 2 tokens.
    """
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    if not layers:
        raise ConfigError("the model has no MoE layer, so it routes nothing; name another model")
    if tokens_NX.ndim != 2 or tokens_NX.shape[0] == 0 or tokens_NX.shape[1] < 2:
        raise DataError(
            f"there are {list(tokens_NX.shape)} [sequences, tokens]; give at least one sequence of 2 tokens"
        )
    num_sequences, length = tokens_NX.shape[0], tokens_NX.shape[1] - 1
    per_batch = max(1, BATCH_TOKENS // length)
    device = model.embed_tokens.weight.device
    losses, routing = [], [[] for _ in layers]
    with _changed(layers, change, device):
        for start in range(0, num_sequences, per_batch):
            batch = to_device(torch.from_numpy(tokens_NX[start : start + per_batch].astype(np.int64)), device)
            with _watched(layers) as seen:
                hidden_BSD = model(batch[:, :-1]).hidden
            losses.append(token_losses(model, hidden_BSD, batch[:, 1:]).numpy())
            for found, one in zip(routing, seen, strict=True):
                found.append(tuple(part.view(len(batch), length, -1) for part in one))
    ids, weights, entropy = (
        np.stack([torch.cat([one[part] for one in found]).numpy() for found in routing]) for part in range(3)
    )
    cfg, indices = layers[0].cfg, model.cfg.moe_layers
    return Observed(tokens_NX[:, :-1], np.concatenate(losses), ids, weights, entropy[..., 0], cfg, indices)


@contextmanager
def _watched(layers: list[MoELayer]) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Within it, (chosen experts, gate weights, entropy) of every layer's forward are kept in the order of layers."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(layer: MoELayer, _: Any, output: Any) -> None:
        gates = layer.router.gates(output.router_logits)
        probs_TE = gates.probs_TE.double()
        entropy_T1 = -torch.special.xlogy(probs_TE, probs_TE).sum(dim=1, keepdim=True)
        seen.append((gates.topk_ids_TK.to(torch.int16).cpu(), gates.weights_TK.float().cpu(), entropy_T1.float().cpu()))

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _changed(layers: list[MoELayer], change: Change, device: torch.device) -> Iterator[None]:
    hooks, routers = [], []
    try:
        if not change.residuals:
            _require(layers, lambda cfg: cfg.gating_residual, "gating residuals (model.moe.gating_residual)")
            hooks = [layer.router.register_forward_pre_hook(lambda _, args: (args[0], None)) for layer in layers]
        if change.swap_share:
            _require(layers, lambda cfg: cfg.num_zero_computation_experts, "zero-computation experts")
            draw = _Draw(change, device)
            for layer in layers:
                routers.append(layer.router)
                layer.router.choose = _swapping(layer.router, draw)  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for router in routers:
            del router.choose  # the method of the class is seen again


class _Draw:
    """The tokens to swap: the same in all layers, for they are drawn by their number in the batch."""

    def __init__(self, change: Change, device: torch.device) -> None:
        self.change, self.device = change, device

    def __call__(self, num_tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.change.seed)
        return to_device(torch.rand(num_tokens, generator=generator) < self.change.swap_share, self.device)


def _swapping(router: Router, draw: _Draw) -> Callable[[Tensor], Any]:
    choose = router.choose
    return lambda logits_TE: choose(
        swap_kinds(logits_TE, choose(logits_TE).topk_ids_TK, router.cfg, draw(len(logits_TE)))
    )


def swap_kinds(logits_TE: Tensor, ids_TK: Tensor, cfg: MoEConfig, swapped_T: Tensor) -> Tensor:
    """Exchange the logits of each chosen expert with those of the best one of the other family that is not chosen.

    The families are FFN and zero-computation experts; an expert without such a partner keeps its logit.
    """
    logits_TE = logits_TE.clone()
    chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, ids_TK, True)
    is_ffn_E = torch.arange(cfg.num_experts, device=logits_TE.device) < cfg.num_ffn_experts
    original_TE = logits_TE.clone()
    for ids_T in ids_TK.unbind(1):
        other_TE = is_ffn_E.unsqueeze(0) != is_ffn_E[ids_T].unsqueeze(1)
        candidates_TE = original_TE.masked_fill(chosen_TE | ~other_TE, -torch.inf)
        best_T = candidates_TE.argmax(dim=1)
        moved_T = swapped_T & candidates_TE.amax(dim=1).isfinite()
        rows_T = moved_T.nonzero()[:, 0]
        old, new = ids_T[rows_T], best_T[rows_T]
        logits_TE[rows_T, new], logits_TE[rows_T, old] = original_TE[rows_T, old], original_TE[rows_T, new]
        chosen_TE[rows_T, new] = True  # one partner each
    return logits_TE


def _require(layers: list[MoELayer], has: Callable[[MoEConfig], Any], what: str) -> None:
    if not has(layers[0].cfg):
        raise ConfigError(f"the model has no {what}; name another model")

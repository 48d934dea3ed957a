"""FFN experts and loss of every token that was read: what the tables are made of, whoever watched the model.

Letters: N sequences, S tokens of each, L MoE layers, K experts per token, B and s: sequences of a micro-batch and the
tokens of each that a rank holds, T = B s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moepp.distributed.device import to_device
from moepp.evaluation.scoring import token_losses
from moepp.model.transformer import Transformer, TransformerLayer
from moepp.moe import MoELayer

Batch = tuple[Tensor, Tensor]
"""Inputs and labels of a micro-batch, int64 [B, S]."""


@dataclass(frozen=True)
class TokenView:
    """What each token cost.

    Attributes:
        input_ids_NS: the tokens.
        losses_NS: cross-entropy of the token that follows, nats.
        ffn_NS: FFN experts among its choices, mean over layers.
        shares: share of each expert kind in the choices of a layer, [L].
        layers: index of the transformer layer of each MoE layer; () where all layers are MoE layers.
    """

    input_ids_NS: np.ndarray
    losses_NS: np.ndarray
    ffn_NS: np.ndarray
    shares: dict[str, np.ndarray]
    layers: tuple[int, ...] = ()


def layer_indices(layers: Sequence[int], count: int) -> Sequence[int]:
    """Return the index of the transformer layer of each of ``count`` MoE layers, as metrics name it."""
    return layers if len(layers) == count else range(count)


def pool(views: Sequence[TokenView]) -> TokenView:
    """Return several as one; sequences are equally long."""
    if len(views) == 1:
        return views[0]
    weights = np.array([view.ffn_NS.size for view in views], dtype=np.float64)
    kinds = views[0].shares
    return TokenView(
        np.concatenate([view.input_ids_NS for view in views]),
        np.concatenate([view.losses_NS for view in views]),
        np.concatenate([view.ffn_NS for view in views]),
        {kind: np.average([view.shares[kind] for view in views], axis=0, weights=weights) for kind in kinds},
        views[0].layers,
    )


def view_evaluation(
    model: Transformer,
    batches: Sequence[Batch],
    evaluate: Callable[[Sequence[Batch]], object],
    replica: tuple[int, int],
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> TokenView:
    """Watch an evaluation of a model in any layout: each rank sees its own tokens and layers. Collective.

    Args:
        model: this rank's part, in eval mode.
        batches: the micro-batches of this rank's replica, on its device; equally many and large on all ranks.
        evaluate: runs them through all parts of the model.
        replica: number of this rank's replica and how many there are.
        sum_over_ranks: of a tensor, over all ranks.
    """
    layers = [layer.moe for layer in model.layers if isinstance(layer, TransformerLayer) and layer.is_moe]
    with _watched_choices(layers) as choices, _watched_losses(model) as losses:
        evaluate(batches)
    moe, number, (mine, replicas) = model.cfg.moe, len(batches), replica
    batch_size, length = batches[0][0].shape
    kinds, num_layers = moe.kind_slices, len(model.cfg.moe_layers)
    # Every (token, layer) is seen by one rank, so a sum over ranks puts the pieces together.
    seen = torch.zeros(3, number, replicas, batch_size, length, dtype=torch.float64)
    counts_LZ = torch.zeros(num_layers, len(kinds), dtype=torch.float64)
    own_Bs = model.sequence.own(torch.arange(length).expand(batch_size, length).contiguous())
    row_B1 = torch.arange(batch_size)[:, None]
    for row, calls in zip(model.moe_rows, choices, strict=True):
        if len(calls) != number:
            raise RuntimeError(f"a layer was called {len(calls)} times for {number} micro-batches")
        for index, ids_TK in enumerate(calls):
            is_ffn_Bs = (ids_TK < moe.num_ffn_experts).sum(dim=1).view(batch_size, -1).double()
            seen[0, index, mine][row_B1, own_Bs] += is_ffn_Bs / num_layers
            for column, experts in enumerate(kinds.values()):
                counts_LZ[row, column] += ((ids_TK >= experts.start) & (ids_TK < experts.stop)).sum()
    for index, loss_Bs in enumerate(losses):
        seen[1, index, mine][row_B1, own_Bs] = loss_Bs
        seen[2, index, mine][row_B1, own_Bs] = model.sequence.own(batches[index][0].cpu()).double()
    device = batches[0][0].device
    seen = sum_over_ranks(to_device(seen, device)).cpu().reshape(3, -1, length).numpy()
    counts_LZ = sum_over_ranks(to_device(counts_LZ, device)).cpu().numpy()
    shares_LZ = counts_LZ / np.maximum(counts_LZ.sum(axis=1, keepdims=True), 1)
    shares = {kind: shares_LZ[:, column] for column, kind in enumerate(kinds) if moe.expert_counts[kind]}
    return TokenView(seen[2].astype(np.int64), seen[1], seen[0], shares, model.cfg.moe_layers)


@contextmanager
def _watched_choices(layers: Sequence[MoELayer]) -> Iterator[list[list[Tensor]]]:
    """Within it, the chosen experts [T, K] of every call of each layer are kept."""
    kept: list[list[Tensor]] = [[] for _ in layers]

    def keep(calls: list[Tensor]) -> Callable:
        def hook(layer: MoELayer, _: object, output: object) -> None:
            gates = layer.router.gates(output.router_logits)  # pyright: ignore[reportAttributeAccessIssue]
            calls.append(gates.topk_ids_TK.to(torch.int16).cpu())

        return hook

    hooks = [layer.register_forward_hook(keep(calls)) for layer, calls in zip(layers, kept, strict=True)]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _watched_losses(model: Transformer) -> Iterator[list[Tensor]]:
    """Within it, the loss [B, s] of every token that this rank's head sees is kept."""
    kept: list[Tensor] = []
    cross_entropy = model.cross_entropy

    def watch(hidden_BSD: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
        labels_Bs = model.sequence.own(labels_BS)
        loss_Bs = token_losses(model, hidden_BSD, labels_Bs.clamp(min=0))
        kept.append(torch.where(labels_Bs.cpu() < 0, 0.0, loss_Bs))
        return cross_entropy(hidden_BSD, labels_BS)

    model.cross_entropy = watch
    try:
        yield kept
    finally:
        del model.cross_entropy  # the method of the class is seen again

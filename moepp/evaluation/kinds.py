"""Which kinds of experts the tokens of a benchmark choose, layer by layer (MoE++, arXiv 2410.07348, Fig. 8).

Letters: B sequences, S tokens of each with padding, T = B S, L MoE layers, Z expert kinds, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moepp.distributed.device import to_device
from moepp.model.transformer import Transformer
from moepp.moe import MoELayer


@dataclass(frozen=True)
class KindCounts:
    """How many choices of each kind the tokens of a benchmark made in each layer.

    Attributes:
        tokens: that were read; a question counts once for every answer that is scored with it.
        choices: of each kind, by MoE layer; kinds that the model lacks are left out.
    """

    tokens: int = 0
    choices: dict[str, list[int]] = field(default_factory=dict)

    def __add__(self, other: KindCounts) -> KindCounts:
        kinds = {**self.choices, **other.choices}
        added = {kind: _added(self.choices.get(kind), other.choices.get(kind)) for kind in kinds}
        return KindCounts(self.tokens + other.tokens, added)

    def __sub__(self, other: KindCounts) -> KindCounts:
        minus = {kind: [-count for count in counts] for kind, counts in other.choices.items()}
        return self + KindCounts(-other.tokens, minus)

    @property
    def shares(self) -> dict[str, list[float]]:
        """Share of each kind in the choices of a layer; {} where nothing was counted."""
        totals = [sum(counts) for counts in zip(*self.choices.values(), strict=True)]
        if not totals or min(totals) <= 0:
            return {}
        return {
            kind: [count / total for count, total in zip(counts, totals, strict=True)]
            for kind, counts in self.choices.items()
        }


def _added(a: Sequence[int] | None, b: Sequence[int] | None) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)] if a and b else list(a or b or ())


@contextmanager
def counted_kinds(model: Transformer, mask_BS: Tensor) -> Iterator[list[KindCounts]]:
    """Within it, the choices of the first forward pass are counted; one element when it is left.

    What a model goes on to write is not counted: it is no text of the benchmark.

    Args:
        model: whole in depth, as evaluations have it.
        mask_BS: which tokens are no padding; bool, on the host.
    """
    mask_T1 = to_device(mask_BS.reshape(-1, 1), next(model.parameters()).device)
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    counts: list[Tensor | None] = [None] * len(layers)

    def keep(number: int) -> Callable:
        def hook(layer: MoELayer, _: object, output: object) -> None:
            if counts[number] is not None:  # a token that it wrote
                return
            ids_TK = layer.router.gates(output.router_logits).topk_ids_TK  # pyright: ignore[reportAttributeAccessIssue]
            slices = layer.cfg.kind_slices.values()
            inside = [((ids_TK >= one.start) & (ids_TK < one.stop) & mask_T1).sum() for one in slices]
            counts[number] = torch.stack(inside)

        return hook

    hooks = [layer.register_forward_hook(keep(number)) for number, layer in enumerate(layers)]
    found: list[KindCounts] = []
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    known = [count for count in counts if count is not None]
    if layers and len(known) == len(layers):
        counts_LZ = torch.stack(known).tolist()
        kinds = layers[0].cfg.expert_counts
        by_kind = {kind: [row[z] for row in counts_LZ] for z, (kind, count) in enumerate(kinds.items()) if count}
        found.append(KindCounts(int(mask_BS.sum()), by_kind))

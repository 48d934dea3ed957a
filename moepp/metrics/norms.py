"""Norms of gradients and weights by module and by layer, over all ranks; every element counts once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from moepp.engine.engine import OwnPart
from moepp.engine.norms import squared_norm
from moepp.metrics.routing import spaced
from moepp.metrics.values import Value

MODULES = {  # metric -> what its parameters' names hold; the first that does counts
    "embedding": ("embed_tokens.",),
    "lm_head": ("lm_head.",),
    "attention": ("self_attn.",),
    "router": ("moe.router.",),
    "ffn_experts": ("moe.experts.",),
    "zero_computation_experts": ("moe.zero_computation.",),
    "dense_ffn": ("mlp.",),
    "norms": ("norm",),
}
_KINDS = ("gradient", "weight")


class ModuleNorms:
    """Sums the squares of what optimizers hold, of the steps that are looked at.

    Args:
        num_layers: of the transformer.
        device: of the parameters.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._num_layers, self._device = num_layers, device
        self._squares: Tensor | None = None  # of the last step that was looked at: [layers + 1, modules, 2]

    @torch.no_grad()
    def watch(self, parts: Iterable[OwnPart]) -> None:
        """Look at one step's parts: a :data:`moepp.engine.engine.Watch`."""
        squares = torch.zeros(*self._shape, dtype=torch.float64, device=self._device)
        for part in parts:
            layer, module = self._place(part.name)
            for kind, tensor in enumerate((part.gradient, part.weight)):
                squares[layer, module, kind] += squared_norm(tensor) / part.copies
        self._squares = squares

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self._num_layers + 1, len(MODULES), len(_KINDS)

    def _place(self, name: str) -> tuple[int, int]:
        """Return the row and column of a parameter; the last row has what is in no layer."""
        first, _, rest = name.partition(".")
        layer = int(rest.partition(".")[0]) if first == "layers" else self._num_layers
        for module, parts in enumerate(MODULES.values()):
            if any(part in name for part in parts):
                return layer, module
        raise ValueError(f"parameter {name} belongs to no module of {', '.join(MODULES)}")

    def values(self) -> dict[str, Value]:
        """Return the squares of the last step that was looked at, zeros if there was none; start anew."""
        squares, self._squares = self._squares, None
        return {"norms": Value.sum(torch.zeros(*self._shape, dtype=torch.float64) if squares is None else squares)}

    def metrics(self, reduced: Mapping[str, Tensor], by_layer: bool) -> dict[str, float]:
        """Return the norms by module and, with ``by_layer``, of whole layers; none if no step was looked at."""
        squares = reduced["norms"].numpy()
        found: dict[str, float] = {}
        for kind, name in enumerate(_KINDS):
            if not squares[:, :, 1].any():
                break  # no model has weights of zeros alone
            for module, square in zip(MODULES, squares[:, :, kind].sum(axis=0), strict=True):
                if squares[:, list(MODULES).index(module), 1].any():
                    found[f"norm/{name}/{module}"] = float(np.sqrt(square))
            for layer in spaced(self._num_layers) if by_layer else ():
                found[f"norm/layer_{layer}/{name}"] = float(np.sqrt(squares[layer, :, kind].sum()))
        return found

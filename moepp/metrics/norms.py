"""Norms of gradients and weights by module and by layer, over all ranks; every element counts once.

Shapes: N parts of parameters, P = (layers + 1) x modules places, M parts of the place that has most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moepp.distributed.device import to_device
from moepp.distributed.parameters import split_name
from moepp.engine.engine import OwnPart
from moepp.engine.norms import rough_squared_norms
from moepp.metrics.routing import spaced
from moepp.metrics.values import Value

MODULES = {  # metric -> the component that its parameters belong to; None: none
    "embedding": "embed_tokens",
    "lm_head": "lm_head",
    "attention": "self_attn",
    "router": "router",
    "ffn_experts": "experts",
    "zero_computation_experts": "zero_computation",
    "dense_ffn": "mlp",
    "norms": None,
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
        self._known: list[tuple[str, int]] = []  # names and copies of the parts that these two are of
        self._copies_N = self._members_PM = torch.empty(0)

    @torch.no_grad()
    def watch(self, parts: Sequence[OwnPart], gradient_squares_N: Tensor) -> None:
        """Look at one step's parts: a :data:`moepp.engine.engine.Watch`."""
        known = [(part.name, part.copies) for part in parts]
        if known != self._known or not known:
            self._find_places(parts)
            self._known = known
        weight_squares_N = rough_squared_norms([part.weight for part in parts], self._device)
        squares_2N = torch.stack((gradient_squares_N, weight_squares_N)) / self._copies_N
        squares_2P = F.pad(squares_2N, (0, 1))[:, self._members_PM].sum(dim=2)
        self._squares = squares_2P.T.reshape(self._shape)

    def _find_places(self, parts: Sequence[OwnPart]) -> None:
        """Find which parts are summed for each place; rows are filled up with N, where a zero stands.

        Sums by index add in no fixed order on an accelerator.
        """
        members: list[list[int]] = [[] for _ in range((self._num_layers + 1) * len(MODULES))]
        for index, part in enumerate(parts):
            layer, module = self._place(part.name)
            members[layer * len(MODULES) + module].append(index)
        most = max(map(len, members))
        rows = [row + [len(parts)] * (max(most, 1) - len(row)) for row in members]
        self._members_PM = to_device(torch.tensor(rows), self._device)
        copies = torch.tensor([part.copies for part in parts], dtype=torch.float64)
        self._copies_N = to_device(copies, self._device)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self._num_layers + 1, len(MODULES), len(_KINDS)

    def _place(self, name: str) -> tuple[int, int]:
        """Return the row and column of a parameter; the last row has what is in no layer."""
        first, _, rest = name.partition(".")
        layer = int(rest.partition(".")[0]) if first == "layers" else self._num_layers
        return layer, list(MODULES.values()).index(split_name(name)[0])

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

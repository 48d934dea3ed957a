"""Which part of the model a rank holds: all of it, or the stages of a pipeline that are its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn


@dataclass(frozen=True)
class ModelPart:
    """Layers by their index in the whole model, and the two ends.

    Attributes:
        layers: indices of the layers held.
        has_embedding: the part begins with the embedding.
        has_head: the part ends with the final norm and the output layer.
    """

    layers: frozenset[int]
    has_embedding: bool = True
    has_head: bool = True

    @classmethod
    def whole(cls, num_layers: int) -> ModelPart:
        """All of a model."""
        return cls(frozenset(range(num_layers)))

    @classmethod
    def of_stages(cls, stage_layers: Sequence[range], stages: Sequence[int]) -> ModelPart:
        """Return the part of a rank that holds these stages.

        Args:
            stage_layers: layers of every stage of the pipeline.
            stages: the rank's own.
        """
        layers = frozenset(layer for stage in stages for layer in stage_layers[stage])
        return cls(layers, 0 in stages, len(stage_layers) - 1 in stages)


class LayerElsewhere(nn.Module):
    """Stands for a layer that another rank holds, so that names count layers of the whole model. No parameters."""

    is_moe = False

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to run."""
        raise RuntimeError("this layer is on another rank of the pipeline; run the stages in turn")

"""Names and shapes of the released format's tensors. Letters: D width, F expert width, N experts of every kind."""

from __future__ import annotations

import re

from moepp.config import ModelConfig
from moepp.interop.weights import Piece

_LAYER = re.compile(r"layers\.(\d+)\.moe\.(.+)")
_SAME_SHAPE = {
    "router.weight": "gate.wg.weight",
    "router.fc1.weight": "gate.wg.0.weight",
    "router.fc2.weight": "gate.wg.2.weight",
    "router.gate_map.weight": "gate.gate_map.weight",
}
_FFN = {"experts.gate_up_proj": "up_proj.weight", "experts.down_proj": "down_proj.weight"}
_CONSTANT = {"zero_computation.alpha_proj": "wg.weight", "zero_computation.value": "constant"}


def pieces_of(name: str, shape: tuple[int, ...], cfg: ModelConfig) -> list[Piece]:
    """Return the released tensors of one parameter of :class:`moepp.model.Transformer` (whole model)."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return [Piece(name if name.startswith("lm_head") else f"model.{name}", shape)]
    layer, part = match.groups()
    moe = f"model.layers.{layer}.mlp.moe"
    if part in _SAME_SHAPE:
        return [Piece(f"{moe}.{_SAME_SHAPE[part]}", shape)]
    names, first = (_FFN, 0) if part in _FFN else (_CONSTANT, cfg.moe.kind_slices["constant"].start)
    return [Piece(f"{moe}.experts.experts.{first + i}.{names[part]}", shape[1:], (i,)) for i in range(shape[0])]

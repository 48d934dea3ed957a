"""Heat maps for W&B: small pictures with axes, drawn while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from moepp.metrics.routing import RoutingSnapshot

_INCHES, _DPI = (6.0, 3.6), 80


def routing_images(snapshot: RoutingSnapshot) -> dict[str, np.ndarray]:
    """Return the choices of every expert in every layer as a picture, uint8 [height, width, 3].

    ``routing/experts`` shows shares of a layer's choices, FFN experts first; ``routing/ffn_load`` the load of FFN
    experts over the mean of their layer, where 1 is perfect balance. Neither pyplot nor settings that other threads see
    are touched.
    """
    names = [f"{kind} {n}" if count > 1 else kind for kind, count in snapshot.kinds.items() for n in range(count)]
    where = f"step {snapshot.step:,}, {snapshot.tokens:,} tokens"
    images = {}
    if len(names):
        title, unit = f"Choices by layer and expert, {where}", "share of the layer's choices"
        images["routing/experts"] = _heat_map(snapshot.share_LE, names, snapshot.layers, title, unit)
    num_ffn = snapshot.kinds.get("ffn", 0)
    ffn_LE = snapshot.share_LE[:, :num_ffn]
    if num_ffn:
        load_LE = ffn_LE / np.maximum(ffn_LE.mean(axis=1, keepdims=True), 1e-12)
        title, unit = f"Load of FFN experts, {where}", "load over the layer's mean"
        images["routing/ffn_load"] = _heat_map(load_LE, names[:num_ffn], snapshot.layers, title, unit)
    return images


def _heat_map(values_LE: np.ndarray, names: Sequence[str], layers: Sequence[int], title: str, unit: str) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="tight")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(values_LE, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0.0)
    step = max(1, -(-len(names) // 16))
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=60, ha="right", fontsize=7, parse_math=False)
    step = max(1, -(-len(layers) // 12))
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=7)
    axes.set_xlabel("expert", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label=unit)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

"""Pictures for W&B, small and with axes, drawn while training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from moepp.metrics.routing import RoutingSnapshot

_INCHES, _DPI = (6.0, 3.6), 80


def routing_images(snapshot: RoutingSnapshot) -> dict[str, np.ndarray]:
    """Return the choices of every expert in every layer as a picture, uint8 [height, width, 3].

    ``routing/experts`` shows shares of a layer's choices, FFN experts first; ``routing/ffn_load`` the load of FFN
    experts over the mean of their layer, where 1 is perfect balance; ``routing/gates`` how the gate weights of the
    first and second choice are distributed, with and without gating residuals, where those were observed. Neither
    pyplot nor settings that other threads see are touched.
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
    gates = {label: shares for label, shares in gate_distributions(snapshot).items() if np.isfinite(shares).all()}
    if gates:
        images["routing/gates"] = _gate_lines(gates, f"Gate weights, mean of layers, {where}")
    return images


def gate_distributions(snapshot: RoutingSnapshot) -> dict[str, np.ndarray]:
    """Return the shares of equal bins of [0, 1] of each choice's gate weights, mean over layers, by its label (Fig. 6).

    NaN where nothing was observed. What the router would weigh without its gating residual is there where it has one.
    """
    labels = {
        "first": "first choice",
        "second": "second choice",
        "first_without_residual": "first, without residuals",
        "second_without_residual": "second, without residuals",
    }
    found = {label: snapshot.gates[name] for name, label in labels.items() if name in snapshot.gates}
    with np.errstate(invalid="ignore"):  # a mean of nothing is NaN
        return {
            label: np.nansum(share_LB, axis=0) / np.isfinite(share_LB).sum(axis=0) for label, share_LB in found.items()
        }


def _gate_lines(gates: Mapping[str, np.ndarray], title: str) -> np.ndarray:
    figure, axes = _new_figure()
    for label, shares in gates.items():
        style = {"color": f"C{int('second' in label)}", "linestyle": "--" if "without" in label else "-"}
        axes.stairs(shares, np.linspace(0, 1, len(shares) + 1), label=label, **style)
    axes.set_xlabel("gate weight", fontsize=8)
    axes.set_ylabel("share of tokens per bin", fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper center")
    return _pixels(figure)


def _new_figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="tight")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _pixels(figure: Any) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _heat_map(values_LE: np.ndarray, names: Sequence[str], layers: Sequence[int], title: str, unit: str) -> np.ndarray:
    figure, axes = _new_figure()
    image = axes.imshow(values_LE, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0.0)
    step = max(1, -(-len(names) // 16))
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=60, ha="right", fontsize=7, parse_math=False)
    step = max(1, -(-len(layers) // 12))
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=7)
    axes.set_xlabel("expert", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label=unit)
    return _pixels(figure)

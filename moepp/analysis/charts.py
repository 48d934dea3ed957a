"""The charts of a run, or of several beside each other: each with axes, units and what to conclude.

Letters: L layers, P points in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from moepp.analysis.figures import Figure, Palette, compact, draw_figure, format_counts, legend
from moepp.analysis.runs import Run, Series
from moepp.model.accounting import balanced_ffn_per_token

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_COLUMNS = 200  # of a heat map; more are thinner than a pixel
_TOKENS, _FLOPS = "training tokens", "floating-point operations, forward and backward"


def charts(runs: Sequence[Run]) -> list[Figure]:
    """Every chart for which these runs have numbers."""
    drawn = [
        _loss_chart(runs, over_flops=False),
        _loss_chart(runs, over_flops=True),
        _ffn_chart(runs),
        _throughput_chart(runs),
        _bytes_chart(runs),
        _line_chart(runs, "train/grad_norm", "Gradient norm", "global gradient norm before clipping", _norm_caption),
    ]
    if len(runs) == 1:
        run = runs[0]
        drawn += [
            _kinds_chart(run),
            _heat_map(run, "share_ffn", "FFN share by layer", "share of choices that are FFN experts", _share_caption),
            _heat_map(run, "max_over_mean", "FFN load by layer", "busiest FFN expert over the mean", _load_caption),
        ]
    return [figure for figure in drawn if figure is not None]


def _plot(axes: Axes, palette: Palette, number: int, x: Sequence[float], y: Sequence[float], label: str) -> None:
    marker = {"marker": "o", "markersize": 4} if len(x) < 30 else {}
    axes.plot(x, y, label=label, linewidth=1.6, **palette.line(number), **marker)


def _loss_chart(runs: Sequence[Run], over_flops: bool) -> Figure | None:
    curves: list[tuple[Run, str, Sequence[float], Sequence[float]]] = []
    for run in runs:
        for metric, label in (("train/loss", "training"), ("eval/loss", "validation")):
            if len(runs) > 1 and metric == "train/loss" and run.series("eval/loss"):
                continue  # of several runs one curve each: the one that does not flatter
            series = run.series(metric)
            x, y = run.over_flops(metric) if over_flops else (series.tokens, series.values)
            if len(y):
                curves.append((run, label, x, y))
    if not curves:
        return None

    def draw(axes: Axes, palette: Palette) -> None:
        for number, (run, label, x, y) in enumerate(curves):
            _plot(axes, palette, number, x, y, label if len(runs) == 1 else run.name)
        axes.set_xlabel(_FLOPS if over_flops else _TOKENS)
        axes.set_ylabel("cross-entropy, nats per token")
        format_counts(axes.xaxis)
        legend(axes)

    what = "operations" if over_flops else "tokens"
    rows = [(run.name, label, compact(x[-1]), f"{y[-1]:.4f}", f"{min(y):.4f}") for run, label, x, y in curves]
    header = ("run", "loss of", what, "last", "lowest")
    name, title = f"loss-over-{what}", f"Loss over {what}"
    return draw_figure(name, title, _loss_caption(runs, curves, what), draw, header, rows)


def _loss_caption(
    runs: Sequence[Run], curves: Sequence[tuple[Run, str, Sequence[float], Sequence[float]]], what: str
) -> str:
    if len(runs) == 1:
        ends = " and ".join(f"{label} {y[-1]:.3f}" for _, label, _, y in curves)
        return f"Ends at {ends} nats per token. Validation far above training means that the model learns by heart."
    ends = sorted((y[-1], run.name) for run, _, _, y in curves)
    caveat = "Read it where the curves share an x: runs that end elsewhere are not compared by their last points."
    return f"Lowest at its end: {ends[0][1]} ({ends[0][0]:.3f}); highest: {ends[-1][1]} ({ends[-1][0]:.3f}). {caveat}"


def _line_chart(runs: Sequence[Run], metric: str, title: str, unit: str, caption) -> Figure | None:
    curves = [(run, series) for run in runs if (series := run.series(metric))]
    if not curves:
        return None

    def draw(axes: Axes, palette: Palette) -> None:
        for number, (run, series) in enumerate(curves):
            _plot(axes, palette, number, series.tokens, series.values, run.name)
        axes.set_xlabel(_TOKENS)
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        format_counts(axes.xaxis)
        format_counts(axes.yaxis)
        legend(axes)

    rows = [(run.name, compact(series.values[-1]), compact(_median(series))) for run, series in curves]
    name = metric.replace("/", "-").replace("_", "-")
    return draw_figure(name, title, caption(curves), draw, ("run", "last", "median"), rows)


def _norm_caption(curves: Sequence[tuple[Run, Series]]) -> str:
    worst = max((max(series.values) / max(_median(series), 1e-30), run.name) for run, series in curves)
    return f"The largest value is {worst[0]:.1f} times the median ({worst[1]}); peaks are what clipping catches."


def _throughput_chart(runs: Sequence[Run]) -> Figure | None:
    def caption(curves: Sequence[tuple[Run, Series]]) -> str:
        speeds = ", ".join(f"{run.name} {_median(series):,.0f}" for run, series in curves)
        return f"Median tokens per second over all devices: {speeds}. Dips are evaluations, checkpoints or slow hosts."

    return _line_chart(runs, "throughput/tokens_per_second", "Throughput", "tokens per second", caption)


def _ffn_chart(runs: Sequence[Run]) -> Figure | None:
    def caption(curves: Sequence[tuple[Run, Series]]) -> str:
        parts = []
        for run, series in curves:
            target = ""
            if run.config is not None and run.config.model.moe.num_zero_computation_experts:
                target = f" (balance loss aims at {balanced_ffn_per_token(run.config.model.moe):.2f})"
            parts.append(f"{run.name} {series.values[-1]:.2f}{target}")
        return f"At the end: {', '.join(parts)}. What lies below top-k is work that zero-computation experts save."

    title, unit = "FFN experts per token", "FFN experts per token, mean over layers"
    return _line_chart(runs, "routing/ffn_per_token", title, unit, caption)


def _bytes_chart(runs: Sequence[Run]) -> Figure | None:
    bars = [(run, *run.bytes_sent) for run in runs if run.bytes_sent is not None and run.bytes_sent[1] > 0]
    if not bars:
        return None

    def draw(axes: Axes, palette: Palette) -> None:
        places = range(len(bars))
        axes.barh([p + 0.2 for p in places], [sent for _, sent, _ in bars], 0.38, color=palette.series(0), label="sent")
        vanilla = [vanilla for _, _, vanilla in bars]
        axes.barh([p - 0.2 for p in places], vanilla, 0.38, color=palette.series(7), label="vanilla MoE")
        axes.set_yticks(list(places), [run.name for run, _, _ in bars])
        axes.set_xlabel("bytes of rows between ranks per step")
        format_counts(axes.xaxis)
        legend(axes)

    saved = ", ".join(f"{run.name} {100 * (1 - sent / vanilla):.1f}%" for run, sent, vanilla in bars)
    rows = [(run.name, f"{sent:,.0f}", f"{vanilla:,.0f}") for run, sent, vanilla in bars]
    caption = f"Saved against a vanilla MoE with the same tokens, top-k and placement: {saved}."
    return draw_figure("bytes", "Expert-parallel traffic", caption, draw, ("run", "bytes", "vanilla bytes"), rows)


def _kinds_chart(run: Run) -> Figure | None:
    shares = {kind: run.layers(f"share_{kind}") for kind in run.kinds}
    layers = list(shares.get("ffn", {}))
    if not layers:
        return None

    def draw(axes: Axes, palette: Palette) -> None:
        left = [0.0] * len(layers)
        for number, (kind, series) in enumerate(shares.items()):
            values = [(series[layer].last or 0.0) if layer in series else 0.0 for layer in layers]
            axes.barh(range(len(layers)), values, 0.8, left=left, color=palette.series(number), label=kind)
            left = [sum(pair) for pair in zip(left, values, strict=True)]
        step = max(1, len(layers) // 16)
        axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the router's choices, before drops")
        axes.set_ylabel("layer")
        legend(axes)

    rows = [(str(layer), *(f"{(shares[k][layer].last or 0):.3f}" for k in shares)) for layer in layers]
    ffn = {layer: shares["ffn"][layer].last or 0 for layer in layers}
    most, least = max(ffn, key=ffn.__getitem__), min(ffn, key=ffn.__getitem__)
    caption = (
        f"Layer {most} gives the largest share to FFN experts ({ffn[most]:.0%}), layer {least} the smallest "
        f"({ffn[least]:.0%}); the rest costs almost nothing."
    )
    return draw_figure("kinds", "Expert kinds by layer", caption, draw, ("layer", *shares), rows)


def _heat_map(run: Run, metric: str, title: str, unit: str, caption) -> Figure | None:
    layers = run.layers(metric)
    if not layers:
        return None
    tokens = sorted({token for series in layers.values() for token in series.tokens})
    stride = -(-len(tokens) // _MAX_COLUMNS)
    kept = tokens[stride - 1 :: stride]
    by_layer = [dict(zip(series.tokens, series.values, strict=True)) for series in layers.values()]
    values_LP = [[values.get(token, float("nan")) for token in kept] for values in by_layer]

    def draw(axes: Axes, palette: Palette) -> None:
        axes.grid(False)
        span = (0, kept[-1], len(layers) - 0.5, -0.5)
        image = axes.imshow(values_LP, aspect="auto", interpolation="nearest", extent=span, cmap="viridis")
        step = max(1, len(layers) // 12)
        axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in list(layers)[::step]])
        axes.set_xlabel(_TOKENS)
        axes.set_ylabel("layer")
        format_counts(axes.xaxis)
        bar = axes.figure.colorbar(image, ax=axes, label=unit)  # pyright: ignore[reportAttributeAccessIssue]
        bar.outline.set_visible(False)

    last = {layer: series.values[-1] for layer, series in layers.items()}
    rows = [(str(layer), f"{series.values[0]:.3f}", f"{series.values[-1]:.3f}") for layer, series in layers.items()]
    name = metric.replace("_", "-")
    return draw_figure(name, title, caption(last), draw, ("layer", "first", "last"), rows)


def _share_caption(last: dict[int, float]) -> str:
    spread = max(last.values()) - min(last.values())
    return (
        f"At the end layers differ by up to {spread:.0%} of their choices; a layer at 0 or 1 routes nothing by content."
    )


def _load_caption(last: dict[int, float]) -> str:
    worst = max(last, key=last.__getitem__)
    return f"1 is perfect balance. At the end layer {worst} is the most uneven ({last[worst]:.2f}): others wait for it."


def _median(series: Series) -> float:
    values = sorted(series.values)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else sum(values[middle - 1 : middle + 1]) / 2


def tokens_per_second(run: Run) -> float | None:
    """Median of the logged throughput."""
    series = run.series("throughput/tokens_per_second")
    return _median(series) if series else None


def frontier(runs: Sequence[Run]) -> Figure | None:
    """Draw the final loss against the operations that a token costs: what lies low and left wins."""
    points = []
    for run in runs:
        loss = run.series("eval/loss").last or run.series("train/loss").last
        if loss is not None and run.flops and run.flops.tokens[-1]:
            points.append((run.flops.values[-1] / run.flops.tokens[-1], loss, run))
    if len(points) < 2:
        return None
    points.sort(key=lambda point: point[:2])
    best = [points[0]]
    for point in points[1:]:
        if point[1] < best[-1][1]:
            best.append(point)

    def draw(axes: Axes, palette: Palette) -> None:
        axes.plot([x for x, _, _ in best], [y for _, y, _ in best], color=palette["muted"], linewidth=1)
        for x, y, run in points:
            axes.plot([x], [y], "o", color=palette.series(0 if (x, y, run) in best else 7))
            axes.annotate(run.name, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
        axes.margins(0.15)
        axes.set_xlabel("operations per training token")
        axes.set_ylabel("final loss, nats per token")
        format_counts(axes.xaxis)

    rows = [(run.name, compact(x), f"{y:.4f}") for x, y, run in points]
    gains = [
        f"{a[2].name} to {b[2].name}: {a[1] - b[1]:.3f} nats for {b[0] / a[0]:.2f} times the cost"
        for a, b in pairwise(best)
    ]
    caption = "No run is both cheaper and better than those on the line. " + ("; ".join(gains) + "." if gains else "")
    return draw_figure("frontier", "Loss against cost", caption, draw, ("run", "operations per token", "loss"), rows)

"""How the layers of one run route: expert kinds, loads and gate weights, at the end and over the training.

Letters: L MoE layers, E experts, P points in time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moepp.analysis.charts import TOKENS
from moepp.analysis.curves import Curve
from moepp.analysis.figures import Figure, Palette, compact, format_counts, label_of, legend
from moepp.analysis.images import gate_distributions
from moepp.analysis.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moepp.metrics.routing import RoutingSnapshot

_MAX_COLUMNS = 200  # of a heat map; more are thinner than a pixel
_MAX_ROWS = 240
_HISTORY = "routing.jsonl"


def routing_charts(run: Run) -> list[Figure]:
    """Every chart of routing for which the run has numbers."""
    drawn = [
        _kinds_chart(run),
        _layer_map(run, "share_ffn", "FFN share by layer", "share of choices that are FFN experts", _share_caption),
        _layer_map(run, "max_over_mean", "FFN load by layer", "busiest FFN expert over the mean", _load_caption),
        _layer_map(run, "entropy", "Router entropy by layer", "entropy of the router, nats", _entropy_caption),
        _layer_map(run, "gradient", "Gradient norm by layer", "gradient norm before clipping", _norm_caption, "norm"),
    ]
    if run.routing:
        drawn += [_expert_map(run.routing[-1]), _experts_over_time(run.routing), _gate_chart(run.routing[-1])]
    return [figure for figure in drawn if figure is not None]


def _kinds_chart(run: Run) -> Figure | None:
    layers, shares, source = _last_shares(run)
    if not layers:
        return None

    def draw(axes: Axes, palette: Palette) -> None:
        left = [0.0] * len(layers)
        for number, (kind, values) in enumerate(shares.items()):
            axes.barh(range(len(layers)), values, 0.8, left=left, color=palette.series(number), label=label_of(kind))
            left = [sum(pair) for pair in zip(left, values, strict=True)]
        _layer_ticks(axes, layers)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the router's choices, before drops")
        axes.set_ylabel("layer")
        legend(axes)

    rows = [(str(layer), *(f"{values[n]:.3f}" for values in shares.values())) for n, layer in enumerate(layers)]
    ffn = dict(zip(layers, shares["ffn"], strict=True))
    most, least = max(ffn, key=ffn.__getitem__), min(ffn, key=ffn.__getitem__)
    if len(shares) == 1:
        caption = "Every choice is an FFN expert: the model has no other kind."
    else:
        caption = f"Share of FFN experts at the end: from {ffn[least]:.0%} (layer {least}) to {ffn[most]:.0%} ({most})."
    return Figure("kinds", "Expert kinds by layer", caption, draw, ("layer", *shares), rows, source)


def _last_shares(run: Run) -> tuple[list[int], dict[str, list[float]], str]:
    """Return layers, the last share of each kind in them, and where that is from: all layers where they were kept."""
    if run.routing:
        last = run.routing[-1]
        shares, first = {}, 0
        for kind, count in last.kinds.items():
            if count:
                shares[kind] = last.share_LE[:, first : first + count].sum(axis=1).tolist()
            first += count
        return list(last.layers), shares, f"{_HISTORY}, last line"
    series = {kind: run.layers(f"share_{kind}") for kind in run.kinds}
    layers = list(series.get("ffn", {}))
    last_of = {
        kind: [(by[layer].last or 0.0) if layer in by else 0.0 for layer in layers] for kind, by in series.items()
    }
    return layers, last_of, "routing/layer_<i>/share_<kind>, last record"


def _layer_ticks(axes: Axes, layers: Sequence[int]) -> None:
    step = max(1, len(layers) // 12)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])


def _layer_map(
    run: Run,
    metric: str,
    title: str,
    unit: str,
    caption: Callable[[Mapping[int, float]], str],
    family: str = "routing",
) -> Figure | None:
    layers = {layer: series for layer, series in run.layers(metric, family).items() if series}
    if not layers:
        return None
    tokens = sorted({token for series in layers.values() for token in series.tokens})
    columns, start = time_columns(tokens, _interval(run))
    by_layer = [dict(zip(series.tokens, series.values, strict=True)) for series in layers.values()]
    shown = [-1 if column is None else tokens[column] for column in columns]  # no record is at -1: an empty column
    values_LP = [[values.get(token, float("nan")) for token in shown] for values in by_layer]

    def draw(axes: Axes, palette: Palette) -> None:
        _image(axes, values_LP, unit, (start, tokens[-1], len(layers) - 0.5, -0.5))
        _layer_ticks(axes, list(layers))
        axes.set_xlabel(TOKENS)
        axes.set_ylabel("layer")
        format_counts(axes.xaxis)

    last = {layer: series.values[-1] for layer, series in layers.items()}
    rows = [(str(layer), f"{series.values[0]:.3f}", f"{series.values[-1]:.3f}") for layer, series in layers.items()]
    name = metric.replace("_", "-")
    left_out = len(tokens) - len({column for column in columns if column is not None})
    text = caption(last) + (
        f" {left_out} of {len(tokens)} records are too close to others to be drawn." * bool(left_out)
    )
    source = f"{family}/layer_<i>/{metric}"
    return Figure(name, title, text, draw, ("layer", "first", "last"), rows, source)


def _interval(run: Run) -> float:
    """Tokens between two records, as configured; of a step where that is not known."""
    steps = run.config.train.log_interval if run.config is not None else 1
    return steps * run.tokens / max(run.steps, 1)


def time_columns(tokens: Sequence[float], interval: float) -> tuple[list[int | None], float]:
    """Return which record each of equally wide columns shows, up to the last record, and where the first one begins.

    A record is about what lies between it and the one before; about no more than twice the usual distance, so that what
    was not measured stays empty. A run that was first measured late begins there.

    Args:
        tokens: of the records, ascending.
        interval: between records, where there is one alone.
    """
    import numpy as np

    gaps = np.diff(sorted(set(tokens)))
    usual = float(np.median(gaps)) if len(gaps) else max(float(interval), 1.0)
    start = max(0.0, tokens[0] - usual)
    number = max(1, round((tokens[-1] - start) / (gaps.min() if len(gaps) else usual)))
    edges = np.linspace(start, tokens[-1], min(number, _MAX_COLUMNS) + 1)
    ends = edges[1:] - 1e-9 * (tokens[-1] - start)  # a column that ends with a record shows it
    found = np.searchsorted(tokens, ends)
    width = edges[1] - edges[0]
    columns: list[int | None] = [
        int(one) if tokens[one] - end <= 2 * usual - 0.5 * width else None for one, end in zip(found, ends, strict=True)
    ]
    return columns, start


def _image(
    axes: Axes, values: Any, unit: str, extent: tuple[float, float, float, float], lowest: float | None = None
) -> None:
    axes.grid(False)
    image = axes.imshow(values, aspect="auto", interpolation="nearest", extent=extent, cmap="viridis", vmin=lowest)
    bar = axes.figure.colorbar(image, ax=axes, label=unit)  # pyright: ignore[reportAttributeAccessIssue]
    bar.outline.set_visible(False)


def _share_caption(last: Mapping[int, float]) -> str:
    most, least = max(last, key=last.__getitem__), min(last, key=last.__getitem__)
    return f"At the end from {last[least]:.0%} (layer {least}) to {last[most]:.0%} (layer {most})."


def _load_caption(last: Mapping[int, float]) -> str:
    worst = max(last, key=last.__getitem__)
    mean = sum(last.values()) / len(last)
    return f"1 is perfect balance. At the end layer {worst} is the most uneven ({last[worst]:.2f}); mean {mean:.2f}."


def _entropy_caption(last: Mapping[int, float]) -> str:
    most, least = max(last, key=last.__getitem__), min(last, key=last.__getitem__)
    return (
        f"At the end from {last[least]:.2f} (layer {least}, the most decided) to {last[most]:.2f} nats (layer {most}). "
        "A uniform router has the logarithm of its number of experts."
    )


def _norm_caption(last: Mapping[int, float]) -> str:
    most, least = max(last, key=last.__getitem__), min(last, key=last.__getitem__)
    return f"At the end from {last[least]:.3g} (layer {least}) to {last[most]:.3g} (layer {most})."


def _expert_names(snapshot: RoutingSnapshot) -> list[str]:
    return [f"{kind} {n}" if count > 1 else kind for kind, count in snapshot.kinds.items() for n in range(count)]


def _expert_map(snapshot: RoutingSnapshot) -> Figure:
    """Draw layers x experts at the end."""
    names, layers = _expert_names(snapshot), list(snapshot.layers)
    share_LE = snapshot.share_LE

    def draw(axes: Axes, palette: Palette) -> None:
        extent = (-0.5, len(names) - 0.5, len(layers) - 0.5, -0.5)
        _image(axes, share_LE, "share of the layer's choices", extent, lowest=0.0)
        _layer_ticks(axes, layers)
        step = max(1, -(-len(names) // 16))
        axes.set_xticks(range(0, len(names), step), names[::step], rotation=60, ha="right", fontsize=8)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")

    row, column = divmod(int(share_LE.argmax()), len(names))
    unused = int((share_LE < 0.1 / len(names)).sum())
    caption = (
        f"At {compact(snapshot.tokens)} tokens {names[column]} of layer {layers[row]} has the largest share "
        f"({share_LE[row, column]:.0%}); {unused} of {share_LE.size} experts have less than a tenth of an even share."
    )
    rows = [(str(layer), *(f"{share:.3f}" for share in shares)) for layer, shares in zip(layers, share_LE, strict=True)]
    source = f"{_HISTORY}, last line"
    return Figure("experts", "Choices by layer and expert", caption, draw, ("layer", *names), rows, source)


def _experts_over_time(history: Sequence[RoutingSnapshot]) -> Figure | None:
    """Draw every expert's share over the training, layers below each other."""
    import numpy as np

    last = history[-1]
    names, layers = _expert_names(last), list(last.layers)
    points = [one for one in history if one.share_LE.shape == last.share_LE.shape]
    if len(points) < 2:
        return None
    moved, first = (
        np.abs(after.share_LE - before.share_LE).sum(axis=1).mean() / 2 for before, after in (points[-2:], points[:2])
    )
    columns, start = time_columns([one.tokens for one in points], 1.0)
    keep = max(1, min(len(layers), _MAX_ROWS // len(names)))
    shown = sorted({round(n * (len(layers) - 1) / max(keep - 1, 1)) for n in range(keep)})
    share_PLE = np.stack([one.share_LE for one in points])[:, shown]
    values_PR = share_PLE.reshape(len(points), -1) * len(names)
    blank = np.full(values_PR.shape[1], np.nan)
    values_RP = np.stack([blank if column is None else values_PR[column] for column in columns], axis=1)

    def draw(axes: Axes, palette: Palette) -> None:
        extent = (start, points[-1].tokens, len(values_RP) - 0.5, -0.5)
        _image(axes, values_RP, "share over an even share", extent, lowest=0.0)
        for number in range(1, len(shown)):
            axes.axhline(number * len(names) - 0.5, color="white", linewidth=1)
        step = max(1, len(shown) // 12)
        ticks = [(number + 0.5) * len(names) - 0.5 for number in range(0, len(shown), step)]
        axes.set_yticks(ticks, [str(layers[number]) for number in shown[::step]])
        axes.set_xlabel(TOKENS)
        axes.set_ylabel(f"layer; in each {', '.join(last.kinds)}")
        format_counts(axes.xaxis)

    caption = (
        f"Between the last two snapshots {moved:.1%} of the choices moved to another expert, between the first two "
        f"{first:.1%} (mean over layers)."
    )
    if len(shown) < len(layers):
        caption += f" {len(shown)} of {len(layers)} layers are drawn."
    if len(points) < len(history):
        caption += f" {len(history) - len(points)} snapshots of other layers or experts are left out."
    rows = [
        (f"{layers[n]}", name, f"{share_PLE[0, i, e]:.3f}", f"{share_PLE[-1, i, e]:.3f}")
        for i, n in enumerate(shown)
        for e, name in enumerate(names)
    ]
    header = ("layer", "expert", "first", "last")
    return Figure("experts-over-time", "Experts over the training", caption, draw, header, rows, _HISTORY)


def _gate_chart(snapshot: RoutingSnapshot) -> Figure | None:
    """Draw how gate weights are distributed, with and without what the gating residuals add (Fig. 6)."""
    import numpy as np

    shown = gate_distributions(snapshot)
    unknown = [label for label, shares in shown.items() if not np.isfinite(shares).all()]
    shown = {label: shares for label, shares in shown.items() if label not in unknown}
    if not shown:
        return None
    bins = len(next(iter(shown.values())))
    centres = [(number + 0.5) / bins for number in range(bins)]
    curves = [Curve(label, centres, shares.tolist()) for label, shares in shown.items()]
    means = {curve.label: float(np.dot(curve.x, curve.y) / max(sum(curve.y), 1e-30)) for curve in curves}
    caption = "Mean weight: " + ", ".join(f"{label} {mean:.3f}" for label, mean in means.items()) + "."
    caption += f" Left out, not being finite: {', '.join(unknown)}." if unknown else ""

    def draw(axes: Axes, palette: Palette) -> None:
        for number, curve in enumerate(curves):
            axes.plot(
                curve.x,
                curve.y,
                label=label_of(curve.label),
                linewidth=1.6,
                drawstyle="steps-mid",
                **palette.line(number),
            )
        axes.set_xlabel("gate weight")
        axes.set_ylabel(f"share of tokens per bin of {1 / bins:.2f}")
        axes.set_ylim(bottom=0)
        legend(axes)

    rows = [(f"{x:.3f}", *(f"{curve.y[number]:.4f}" for curve in curves)) for number, x in enumerate(centres)]
    source = f"{_HISTORY}, last line, mean over layers"
    header = ("weight", *(curve.label for curve in curves))
    return Figure("gates", "Gate weights", caption, draw, header, rows, source)

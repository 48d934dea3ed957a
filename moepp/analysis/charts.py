"""The charts of a run, or of several beside each other: each with axes, units and what to conclude.

Captions say what the drawn numbers show and nothing else; runs that differ in their seed alone are one curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moepp.analysis.curves import AXES, Curve, Group, curves_of, group_runs
from moepp.analysis.figures import Figure, Palette, compact, format_counts, legend
from moepp.analysis.runs import SPLIT_NAME, Run, Series
from moepp.model.accounting import balanced_ffn_per_token, max_ffn_per_token

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOKENS = AXES["tokens"]
_SEEDS = " Lines of several seeds are means, bands one sample standard deviation."


def curve_charts(runs: Sequence[Run]) -> list[Figure]:
    """Return loss, throughput and norms over the training."""
    groups = group_runs(runs)
    drawn = [*(_loss_chart(groups, axis) for axis in AXES), _ffn_chart(groups), _throughput_chart(groups)]
    drawn += [_norm_chart(groups), _validation_sets(runs), _benchmarks(runs)]
    return [figure for figure in drawn if figure is not None]


def plot(axes: Axes, palette: Palette, number: int, curve: Curve) -> None:
    """Draw a curve as the n-th of its axes."""
    marker = {"marker": "o", "markersize": 4} if len(curve.x) < 30 else {}
    axes.plot(curve.x, curve.y, label=curve.label, linewidth=1.6, **palette.line(number), **marker)
    if curve.spread is not None:
        low, high = ([y + sign * s for y, s in zip(curve.y, curve.spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(curve.x, low, high, color=palette.series(number), alpha=0.2, linewidth=0)


def curve_figure(
    name: str,
    title: str,
    caption: str,
    curves: Sequence[Curve],
    labels: tuple[str, str],
    source: str,
    bottom: float | None = None,
) -> Figure:
    """Draw curves; ``labels`` of x and y with their units, ``bottom`` of the y axis."""

    def draw(axes: Axes, palette: Palette) -> None:
        for number, curve in enumerate(curves):
            plot(axes, palette, number, curve)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        if bottom is not None:
            axes.set_ylim(bottom=bottom)
            format_counts(axes.yaxis)
        format_counts(axes.xaxis)
        legend(axes)

    rows = []
    for curve in curves:
        spread = "-" if curve.spread is None else f"{curve.spread[-1]:.4g}"
        numbers = (compact(curve.x[-1]), f"{curve.y[-1]:.6g}", spread, f"{min(curve.y):.6g}", f"{median(curve.y):.6g}")
        rows.append((curve.label, *numbers))
    header = ("curve", f"last {labels[0].split(',')[0]}", "last", "± at the last", "lowest", "median")
    has_spread = any(curve.spread is not None for curve in curves)
    return Figure(name, title, caption + (_SEEDS if has_spread else ""), draw, header, rows, source)


def _loss_chart(groups: Sequence[Group], axis: str) -> Figure | None:
    name, title = f"loss-over-{axis.replace(' ', '-')}", f"Loss over {axis}"
    labels = (AXES[axis], "cross-entropy, nats per token")
    if len(groups) == 1 and len(groups[0].runs) == 1:
        run = groups[0].runs[0]
        if axis == "expert operations":
            return None  # the same picture as over operations: of one run there is nothing to compare
        metrics = {"training": "train/loss", "validation": "eval/loss"}
        curves = {
            metric: Curve(what, x, y) for what, metric in metrics.items() for x, y in [run.over(metric, axis)] if y
        }
        if not curves:
            return None
        return curve_figure(name, title, _single_loss_caption(run), list(curves.values()), labels, ", ".join(curves))
    metric = compared_loss([run for group in groups for run in group.runs])
    curves = [curve for _, curve in curves_of(groups, metric, axis)]
    if not curves:
        return None
    caption = _shared_x_caption(curves, axis) + _left_out(groups, curves, metric)
    return curve_figure(name, title, caption, curves, labels, _with_axis(metric, axis))


def compared_loss(runs: Sequence[Run]) -> str:
    """Return the metric that compares runs: validation, which does not flatter, where all of them have it."""
    return "eval/loss" if all(run.series("eval/loss") for run in runs if run.series("train/loss")) else "train/loss"


def _with_axis(metric: str, axis: str) -> str:
    return metric if axis == "tokens" else f"{metric}, routing/ffn_per_token and config.yaml"


def _single_loss_caption(run: Run) -> str:
    train, held_out = run.series("train/loss"), run.series("eval/loss")
    parts = []
    if train:
        parts.append(f"training ends at {train.values[-1]:.3f}")
    if held_out:
        parts.append(f"validation at {held_out.values[-1]:.3f}")
    text = (" and ".join(parts) + " nats per token.").capitalize()
    if held_out:
        best = min(held_out.values)
        at = held_out.tokens[held_out.values.index(best)]
        if held_out.values[-1] > best:
            text += f" The lowest validation was {best:.3f} at {compact(at)} tokens: it has risen since."
        else:
            text += " Validation was never lower than at the end."
    return text


def _shared_x_caption(curves: Sequence[Curve], axis: str) -> str:
    """Say how curves compare at the largest x that all of them have."""
    shared = min(curve.x[-1] for curve in curves)
    if len(curves) == 1:
        return f"Ends at {curves[0].y[-1]:.3f} nats per token."
    if shared < max(curve.x[0] for curve in curves):
        return "The curves share no x, so nothing is compared."
    values = sorted((curve.at(shared), curve.label) for curve in curves)
    (low, best), (high, worst) = values[0], values[-1]
    what = f"At {compact(shared)} {axis}, the furthest that all reach, "
    others = f"{best} is lowest ({low:.3f} nats), {worst} highest ({high:.3f}, {high - low:+.3f})."
    return what + others


def _left_out(groups: Sequence[Group], curves: Sequence[Curve], metric: str) -> str:
    missing = len(groups) - len(curves)
    return f" {missing} setting{'s' if missing > 1 else ''} without {metric} on this axis left out." if missing else ""


def _ffn_chart(groups: Sequence[Group]) -> Figure | None:
    found = curves_of(groups, metric := "routing/ffn_per_token")
    if not found:
        return None
    parts = []
    for group, curve in found:
        config = group.runs[0].config
        text = f"{curve.label} {curve.y[-1]:.2f}"
        if config is not None:
            moe = config.model.moe
            text += f" of at most {max_ffn_per_token(moe)}"
            if moe.num_zero_computation_experts:
                text += f" (a perfect balance loss gives {balanced_ffn_per_token(moe):.2f})"
        parts.append(text)
    labels = (TOKENS, "FFN experts per token, mean over layers")
    curves = [curve for _, curve in found]
    caption = f"At the end: {', '.join(parts)}."
    return curve_figure("ffn-per-token", "FFN experts per token", caption, curves, labels, metric, 0)


def _throughput_chart(groups: Sequence[Group]) -> Figure | None:
    found = curves_of(groups, metric := "throughput/tokens_per_second")
    if not found:
        return None
    curves = [curve for _, curve in found]
    speeds = ", ".join(f"{curve.label} {median(curve.y):,.0f}" for curve in curves)
    slow = min(min(curve.y) / median(curve.y) for curve in curves)
    caption = (
        f"Median tokens per second over all devices: {speeds}. The slowest record is at {slow:.0%} of its curve's "
        "median; evaluation and saving do not count."
    )
    return curve_figure("tokens-per-second", "Throughput", caption, curves, (TOKENS, "tokens per second"), metric, 0)


def _norm_chart(groups: Sequence[Group]) -> Figure | None:
    found = curves_of(groups, metric := "train/grad_norm")
    if not found:
        return None
    parts = []
    for group, curve in found:
        values = [value for run in group.runs for value in run.series(metric).values]
        text = f"{curve.label}: largest {max(values):.3g}, median {median(values):.3g}"
        if (config := group.runs[0].config) is not None and config.optim.grad_clip:
            above = sum(value > config.optim.grad_clip for value in values)
            text += f", {above} of {len(values)} logged steps above optim.grad_clip={config.optim.grad_clip:g}"
        parts.append(text)
    caption = "; ".join(parts) + "."
    labels = (TOKENS, "global gradient norm before clipping")
    return curve_figure("grad-norm", "Gradient norm", caption, [curve for _, curve in found], labels, metric, 0)


def _validation_sets(runs: Sequence[Run]) -> Figure | None:
    """Draw the named validation sets of a run."""
    if len(runs) > 1:
        return None
    names = {name or SPLIT_NAME: key for name, key in _validation_keys(runs[0]).items()}
    curves = [Curve(name, *runs[0].over(key, "tokens")) for name, key in names.items() if runs[0].series(key)]
    if not curves or list(names) == [SPLIT_NAME]:  # which is drawn beside the training loss
        return None
    ends = sorted((curve.y[-1], curve.label) for curve in curves)
    caption = f"Ends at {ends[0][0]:.3f} nats per token."
    if len(ends) > 1:
        caption = (
            f"Easiest at the end: {ends[0][1]} ({ends[0][0]:.3f} nats); hardest: {ends[-1][1]} ({ends[-1][0]:.3f})."
        )
    labels = (TOKENS, "cross-entropy, nats per token")
    return curve_figure("validation-sets", "Loss by validation set", caption, curves, labels, ", ".join(names.values()))


def _validation_keys(run: Run) -> dict[str, str]:
    """Return the keys of validation losses by the name of their set."""
    return run.names(r"eval/(?:(.+)/)?loss")


def _benchmarks(runs: Sequence[Run]) -> Figure | None:
    if len(runs) > 1:
        return None
    run = runs[0]
    names = run.names(r"eval/(.+/(?!loss$|perplexity$)(?!\w*stderr)[^/]+)")
    curves = [Curve(name, *run.over(key, "tokens")) for name, key in names.items() if run.series(key)]
    if not curves:
        return None
    rises = [f"{curve.label} {curve.y[0]:.3f} to {curve.y[-1]:.3f}" for curve in curves]
    caption = f"First to last: {'; '.join(rises)}."
    labels = (TOKENS, "value of the benchmark's metric")
    return curve_figure("benchmarks", "Benchmarks during training", caption, curves, labels, "eval/<task>/<metric>")


def median(values: Sequence[float]) -> float:
    """Return the median."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else sum(ordered[middle - 1 : middle + 1]) / 2


def tokens_per_second(run: Run) -> float | None:
    """Median of the logged throughput."""
    series: Series = run.series("throughput/tokens_per_second")
    return median(series.values) if series else None

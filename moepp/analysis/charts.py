"""The charts of a run, or of several beside each other: each with axes, units and what to conclude.

Captions say what the drawn numbers show and nothing else; runs that differ in their seed alone are one curve.

Letters: P points of a curve, C columns of a drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moepp.analysis.curves import AXES, Curve, Drawn, Group, curves_of, group_runs
from moepp.analysis.evidence import Estimate, undecided, verdict
from moepp.analysis.figures import Figure, Palette, compact, format_counts, label_of, legend
from moepp.analysis.losses import compared_loss, loss_name
from moepp.analysis.runs import Run, Series
from moepp.model.accounting import balanced_ffn_per_token, max_ffn_per_token

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 1000  # points of a band
TOKENS = AXES["tokens"]
_SEEDS = " Lines of several seeds are means, bands one sample standard deviation."


def curve_charts(runs: Sequence[Run], unigram_entropy: float | None = None) -> list[Figure]:
    """Return loss, throughput and norms over the training.

    Args:
        runs: one, or several that are compared.
        unigram_entropy: of the corpus's token frequencies, nats; a line on the losses of one run.
    """
    groups = group_runs(runs)
    drawn = [
        *(_loss_chart(groups, axis, unigram_entropy) for axis in AXES),
        _ffn_chart(groups),
        _throughput_chart(groups),
    ]
    drawn.append(_norm_chart(groups))
    return [figure for figure in drawn if figure is not None]


def plot(axes: Axes, palette: Palette, number: int, curve: Curve) -> None:
    """Draw a curve as the n-th of its axes, in its own colour where it has one."""
    number = number if curve.number is None else curve.number
    marker = {"marker": "o", "markersize": 4} if len(curve.x) < 30 else {}
    axes.plot(curve.x, curve.y, label=label_of(curve.label), linewidth=1.6, **palette.line(number), **marker)
    if curve.spread is not None:
        axes.fill_between(*band(curve), color=palette.series(number), alpha=0.2, linewidth=0)


def band(curve: Curve) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    """Return x, lower and upper edge of a curve with a spread: of a long one what encloses it in narrow columns.

    Lines are simplified when they are drawn, areas are not, and a drawing is no wider than a few hundred pixels.
    """
    import numpy as np

    if curve.spread is None:
        return [], [], []
    x_P, y_P, spread_P = (np.asarray(values, dtype=float) for values in (curve.x, curve.y, curve.spread))
    low_P, high_P = y_P - spread_P, y_P + spread_P
    if len(x_P) <= _COLUMNS:
        return x_P.tolist(), low_P.tolist(), high_P.tolist()
    edges = np.linspace(x_P[0], x_P[-1], _COLUMNS // 2 + 1)[1:-1]
    starts = np.unique([0, *np.searchsorted(x_P, edges)])  # of the points in each column that has any
    ends = np.append(starts[1:], len(x_P)) - 1
    low_C, high_C = np.minimum.reduceat(low_P, starts), np.maximum.reduceat(high_P, starts)
    x_2C = np.stack([x_P[starts], x_P[ends]], axis=1).ravel()
    return x_2C.tolist(), low_C.repeat(2).tolist(), high_C.repeat(2).tolist()


def curve_figure(
    name: str,
    title: str,
    caption: str,
    curves: Sequence[Curve],
    labels: tuple[str, str],
    source: str,
    bottom: float | None = None,
    top: float | None = None,
    level: tuple[str, float] | None = None,
) -> Figure:
    """Draw curves; ``labels`` of x and y with their units, ``bottom`` and ``top`` of the y axis.

    ``level``: name and y of a horizontal line.
    """

    def draw(axes: Axes, palette: Palette) -> None:
        for number, curve in enumerate(curves):
            plot(axes, palette, number, curve)
        if level is not None:
            axes.axhline(level[1], label=level[0], color=palette["muted"], linestyle="--", linewidth=1.2)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        if bottom is not None:
            axes.set_ylim(bottom=bottom)
            format_counts(axes.yaxis)
        if top is not None:
            low = axes.get_ylim()[0]
            axes.set_ylim(low, top + 0.03 * (top - low))
        format_counts(axes.xaxis)
        legend(axes)

    rows = []
    for curve in curves:
        spread = "-" if curve.spread is None else f"{curve.spread[-1]:.4g}"
        numbers = (compact(curve.x[-1]), f"{curve.y[-1]:.6g}", spread, f"{min(curve.y):.6g}", f"{median(curve.y):.6g}")
        rows.append((curve.label, *numbers))
    if level is not None:
        rows.append((level[0], "-", f"{level[1]:.6g}", "-", "-", "-"))
    header = ("curve", f"last {labels[0].split(',')[0]}", "last", "± at the last", "lowest", "median")
    has_spread = any(curve.spread is not None for curve in curves)
    return Figure(name, title, caption + (_SEEDS if has_spread else ""), draw, header, rows, source)


def _loss_chart(groups: Sequence[Group], axis: str, unigram_entropy: float | None = None) -> Figure | None:
    name, title = f"loss-over-{axis.replace(' ', '-')}", f"Loss over {axis}"
    unit = "nats per token"
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
        caption, level = _single_loss_caption(run), None
        if unigram_entropy is not None:
            level = "unigram entropy", unigram_entropy
            caption += f" The dashed line is the unigram entropy, {unigram_entropy:.3f} nats: token frequencies alone."
        drawn, source = list(curves.values()), ", ".join(curves)
        labels = (AXES[axis], f"cross-entropy, {unit}")
        return curve_figure(name, title, caption, drawn, labels, source, level=level)
    metric = compared_loss([run for group in groups for run in group.runs])
    labels = (AXES[axis], f"{loss_name(metric)}, {unit}")
    return compared_chart((name, title), curves_of(groups, metric, axis), axis, labels, _with_axis(metric, axis))


def compared_chart(
    names: tuple[str, str], drawn: Drawn, axis: str, labels: tuple[str, str], source: str
) -> Figure | None:
    """Draw the losses of several settings; ``names``: of the file, and the heading. None without a curve."""
    curves = [curve for _, curve in drawn.curves]
    if not curves:
        return None
    top = _top_of_interest(curves)
    caption = _shared_x_caption(curves, axis) + drawn.remarks
    if top is not None:
        caption += " Higher values, of the beginning, are above the drawing."
    return curve_figure(*names, caption, curves, labels, source, top=top)


def _top_of_interest(curves: Sequence[Curve]) -> float | None:
    """Return the highest value after the first fifth of the curves, if the beginning is far above; else None.

    Of curves that are not half as far as the longest, their ends are seen too, unless they are in that beginning.
    """
    far, behind = far_enough(curves)
    longest = max(curve.tokens for curve in curves)
    later = [max(y for x, y in zip(one.x, one.y, strict=True) if x >= 0.2 * one.x[-1]) for one in far]
    later += [one.y[-1] for one in behind if one.tokens >= 0.2 * longest]
    top, bottom = max(later), min(min(curve.y) for curve in curves)
    return top if max(max(curve.y) for curve in curves) - bottom > 1.3 * (top - bottom) > 0 else None


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
    """Say how curves compare at the largest x that all have that are half as far as the longest."""
    if len(curves) == 1:
        return f"{curves[0].label} ends at {curves[0].y[-1]:.3f} nats per token."
    far, behind = far_enough(curves)
    shared = min(curve.x[-1] for curve in far)
    if len(far) > 1 and shared < max(curve.x[0] for curve in far):
        return "The curves share no x, so nothing is compared."
    values = sorted((estimate(curve, shared) for curve in far), key=lambda one: (one.value, one.label))
    low, high = values[0], values[-1]
    text = f"At {compact(shared)} {axis}, the furthest that all "
    text += "reach" if not behind else f"{len(far)} that are compared reach"
    if len(far) == 1:
        return f"Only {low.label} is far enough to be compared.{behind_text(behind)}"
    text += f", {low.label} is lowest ({low.value:.3f} nats), {high.label} highest ({high.value:.3f}, "
    text += f"{high.value - low.value:+.3f}; {verdict(low, high)})."
    if (same := undecided(low, values[1:-1])) and len(values) > 2:
        text += f" Within the seeds' spread of the lowest: {', '.join(same)}."
    return text + behind_text(behind)


def far_enough(curves: Sequence[Curve]) -> tuple[list[Curve], list[Curve]]:
    """Return the curves that have got half as far as the longest, and the others: a run that has begun says little."""
    longest = max(curve.tokens for curve in curves)
    far = [curve for curve in curves if 2 * curve.tokens >= longest]
    return far, [curve for curve in curves if 2 * curve.tokens < longest]


def behind_text(behind: Sequence[Curve]) -> str:
    """Return a sentence of what is not compared; "" if nothing."""
    if not behind:
        return ""
    if len(behind) > 3:
        return f" {len(behind)} settings that are not half as far as the longest are not compared: see the notes."
    names = ", ".join(f"{curve.label} ({compact(curve.tokens)} tokens)" for curve in behind)
    return f" Not compared, being not half as far as the longest: {names}."


def estimate(curve: Curve, x: float) -> Estimate:
    """Return a curve's value at x, with what its seeds say of it."""
    return Estimate(curve.label, curve.at(x), curve.spread_at(x), curve.seeds)


def extremes(values: Sequence[tuple[float, str]], pattern: str) -> str:
    """List a few values by name; of many, the lowest and the highest; a single one needs no name."""
    if len(values) == 1:
        return pattern.format(values[0][0])
    if len(values) <= 4:
        return ", ".join(f"{label} {pattern.format(value)}" for value, label in values)
    (low, lowest), (high, highest) = min(values), max(values)
    return f"from {pattern.format(low)} ({lowest}) to {pattern.format(high)} ({highest})"


def _ffn_chart(groups: Sequence[Group]) -> Figure | None:
    drawn = curves_of(groups, metric := "routing/ffn_per_token")
    if not drawn.curves:
        return None
    caption = f"At the end: {extremes([(curve.y[-1], curve.label) for _, curve in drawn.curves], '{:.2f}')}."
    bounds = list(dict.fromkeys(filter(None, (_ffn_bounds(group) for group, _ in drawn.curves))))
    if len(bounds) == 1:
        caption += f" {bounds[0]}."
    elif 1 < len(drawn.curves) <= 4:
        told = [(curve.label, _ffn_bounds(group)) for group, curve in drawn.curves]
        caption += "".join(f" {label}: {text[0].lower()}{text[1:]}." for label, text in told if text)
    labels = (TOKENS, "FFN experts per token, mean over layers")
    curves = [curve for _, curve in drawn.curves]
    return curve_figure("ffn-per-token", "FFN experts per token", caption + drawn.remarks, curves, labels, metric, 0)


def _ffn_bounds(group: Group) -> str:
    """Say what a setting allows, and what a perfect balance loss would give; "" where that is not known."""
    config = group.runs[0].config
    if config is None:
        return ""
    moe = config.model.moe
    balanced = f"; a perfect balance loss gives {balanced_ffn_per_token(moe):.2f}"
    return f"At most {max_ffn_per_token(moe)}{balanced if moe.num_zero_computation_experts else ''}"


def _throughput_chart(groups: Sequence[Group]) -> Figure | None:
    drawn = curves_of(groups, metric := "throughput/tokens_per_second")
    if not drawn.curves:
        return None
    curves = [curve for _, curve in drawn.curves]
    speeds = extremes([(median(curve.y), curve.label) for curve in curves], "{:,.0f}")
    slow = min(min(curve.y) / median(curve.y) for curve in curves)
    caption = (
        f"Median tokens per second over all devices: {speeds}. The slowest record is at {slow:.0%} of its curve's "
        f"median; evaluation and saving do not count.{drawn.remarks}"
    )
    return curve_figure("tokens-per-second", "Throughput", caption, curves, (TOKENS, "tokens per second"), metric, 0)


def _norm_chart(groups: Sequence[Group]) -> Figure | None:
    drawn = curves_of(groups, metric := "train/grad_norm")
    if not drawn.curves:
        return None
    largest, above, logged = [], 0, 0
    limits = set()
    for group, curve in drawn.curves:
        values = [value for run in group.runs for value in run.series(metric).values]
        largest.append((max(values), curve.label))
        if (config := group.runs[0].config) is not None and config.optim.grad_clip:
            limits.add(f"{config.optim.grad_clip:g}")
            above += sum(value > config.optim.grad_clip for value in values)
            logged += len(values)
    caption = f"Largest: {extremes(largest, '{:.3g}')}."
    if logged:
        limit = f"={min(limits)}" if len(limits) == 1 else ""
        caption += f" {above or 'None'} of {logged} logged steps {'is' if above == 1 else 'are'} above "
        caption += f"optim.grad_clip{limit}, from where gradients are scaled down."
    labels = (TOKENS, "global gradient norm before clipping")
    curves = [curve for _, curve in drawn.curves]
    return curve_figure("grad-norm", "Gradient norm", caption + drawn.remarks, curves, labels, metric, 0)


def median(values: Sequence[float]) -> float:
    """Return the median."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else sum(ordered[middle - 1 : middle + 1]) / 2


def tokens_per_second(run: Run, until: float | None = None) -> float | None:
    """Median of the logged throughput over the first ``until`` tokens; None: over all of them."""
    series: Series = run.series("throughput/tokens_per_second").until(until)
    return median(series.values) if series else None

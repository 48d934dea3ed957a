"""What a run costs: time by stage, ranks that others wait for, memory, traffic, norms by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moepp.analysis.charts import TOKENS, curve_figure, extremes, median
from moepp.analysis.curves import Curve
from moepp.analysis.figures import Figure, Palette, bar_labels, compact, format_counts, label_of, legend, log_scale
from moepp.analysis.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STAGES = ("data", "forward", "exchange", "backward", "reduction", "optimizer", "pipeline", "other")
_WAITING = ("exchange", "reduction", "pipeline")
_TOLD = 4  # runs of which a caption tells each
_STAGE = r"time/(\w+)"


def cost_charts(runs: Sequence[Run]) -> list[Figure]:
    """Every chart of costs for which these runs have numbers."""
    drawn = [_stage_chart(runs), _bytes_chart(runs)]
    if len(runs) == 1:
        [run] = runs
        drawn += [_stragglers(run), _layer_bytes(run), _memory(run), _norms(run, "gradient"), _norms(run, "weight")]
    return [figure for figure in drawn if figure is not None]


def stage_medians(run: Run) -> dict[str, float]:
    """Return the median seconds per step of each stage that was measured, without the whole step."""
    names = run.names(_STAGE)
    order = [*_STAGES, *(name for name in names if name not in _STAGES)]
    skipped = {"step", "slowest_rank"}
    found = {}
    for name in order:
        if name in names and name not in skipped and not name.endswith("_max_over_mean"):
            values = run.series(names[name]).values
            if values and max(values) > 0:
                found[name] = median(values)
    return found


def _stage_chart(runs: Sequence[Run]) -> Figure | None:
    medians = [(run, stages) for run in runs if (stages := stage_medians(run))]
    if not medians:
        return None
    names = list(dict.fromkeys(name for _, stages in medians for name in stages))

    def draw(axes: Axes, palette: Palette) -> None:
        left = [0.0] * len(medians)
        for number, name in enumerate(names):
            values = [1000 * stages.get(name, 0.0) for _, stages in medians]
            axes.barh(range(len(medians)), values, 0.6, left=left, color=palette.series(number), label=label_of(name))
            left = [sum(pair) for pair in zip(left, values, strict=True)]
        bar_labels(axes, [run.name for run, _ in medians])
        axes.set_xlabel("milliseconds per step: mean of ranks, median of records")
        legend(axes)

    caption = _stage_caption(medians)
    if without := [run.name for run in runs if run not in [one for one, _ in medians]]:
        caption += f" Left out, without time/<stage>: {', '.join(without)}."
    rows = [(run.name, *(f"{1000 * stages.get(name, 0.0):.4g}" for name in names)) for run, stages in medians]
    header = ("run", *(f"{name}, ms" for name in names))
    title = "Step time by stage"
    return Figure("stages", title, caption, draw, header, rows, "time/<stage>")


def _stage_caption(medians: Sequence[tuple[Run, dict[str, float]]]) -> str:
    """Say what a step costs in each run; of many, in the fastest and the slowest."""
    ordered = sorted(medians, key=lambda one: sum(one[1].values()))
    told = list(medians) if len(medians) <= _TOLD else [ordered[0], ordered[-1]]
    parts = []
    for run, stages in told:
        total = sum(stages.values())
        most = sorted(stages, key=stages.__getitem__, reverse=True)[:2]
        text = " and ".join(f"{stages[name] / total:.0%} {name}" for name in most)
        parts.append(f"{run.name}: {1000 * total:.3g} ms per step, of them {text}")
    start = "The fastest and the slowest. " if len(told) < len(medians) else ""
    return f"{start}{'; '.join(parts)}."


def most_uneven(run: Run, typical: Callable[[Sequence[float]], float]) -> tuple[str, float, float] | None:
    """Return the stage in which the slowest rank takes the most time above the mean of ranks; None where there is none.

    Its slowest rank over the mean and that time, seconds per step (0 where ``time/<stage>`` was not logged); a large
    ratio of a stage that takes no time says nothing. Of the stages in which ranks wait for each other the longest time
    is that of the fastest rank, so that they do not count.

    Args:
        run: the run.
        typical: number that stands for many, such as the median.
    """
    found = []
    for stage, key in run.names(r"time/(\w+)_max_over_mean").items():
        ratios, seconds = run.series(key).values, run.series(f"time/{stage}").values
        if ratios and stage not in _WAITING:
            ratio, mean = typical(ratios), typical(seconds) if seconds else 0.0
            found.append((stage, ratio, (ratio - 1) * mean))
    return max(found, key=lambda one: (one[2], one[1]), default=None)


def _stragglers(run: Run) -> Figure | None:
    names = run.names(r"time/(\w+)_max_over_mean")
    curves = [Curve(name, *run.over(key, "tokens")) for name, key in names.items() if run.series(key)]
    if not curves or max(max(curve.y) for curve in curves) <= 1.0:  # one rank
        return None
    caption = "1 means that all ranks take equally long."
    if (worst := most_uneven(run, median)) is not None:
        stage, ratio, seconds = worst
        caption += f" Most is lost in {stage}: its slowest rank takes {ratio:.2f} times the mean"
        caption += f", {1000 * seconds:.3g} ms more per step (medians)." if seconds else " (median)."
    slowest = Counter(int(rank) for rank in run.series("time/slowest_rank").values)
    if slowest:
        rank, count = slowest.most_common(1)[0]
        caption += f" Rank {rank} was the slowest in {count} of {sum(slowest.values())} records."
    labels = (TOKENS, "slowest rank over the mean of ranks")
    source = "time/<stage>_max_over_mean, time/slowest_rank"
    return curve_figure("stragglers", "Waiting for the slowest rank", caption, curves, labels, source)


def _bytes_chart(runs: Sequence[Run]) -> Figure | None:
    bars = [(run, *run.bytes_sent) for run in runs if run.bytes_sent is not None and run.bytes_sent[1] > 0]
    if not bars:
        return None
    savings = [(1 - sent / vanilla, run.name) for run, sent, vanilla in bars]
    caption = f"Saved against a vanilla MoE with the same tokens, top-k and placement: {extremes(savings, '{:.1%}')}."
    if without := [run.name for run in runs if run not in [one for one, *_ in bars]]:
        caption += f" Left out, for they send no rows between ranks: {', '.join(without)}."
    named = [(run.name, sent, vanilla) for run, sent, vanilla in bars]
    source = "comm/dispatch_bytes, comm/dispatch_bytes_vanilla, mean over steps"
    return _pairs("bytes", "Expert-parallel traffic", caption, named, "run", source)


def _layer_bytes(run: Run) -> Figure | None:
    layers = run.names(r"comm/layer_([0-9]+)/dispatch_bytes")
    bars, without = [], []
    for layer, key in sorted(layers.items(), key=lambda item: int(item[0])):
        sent, vanilla = run.per_step(key), run.per_step(f"{key}_vanilla")
        if sent is not None and vanilla:
            bars.append((layer, sent, vanilla))
        else:
            without.append(layer)
    if not bars:
        return None
    saved = {layer: 1 - sent / vanilla for layer, sent, vanilla in bars}
    most, least = max(saved, key=saved.__getitem__), min(saved, key=saved.__getitem__)
    caption = f"Layer {most} saves the most ({saved[most]:.1%}), layer {least} the least ({saved[least]:.1%})."
    caption += f" Left out, for they send nothing: layer {', '.join(without)}." if without else ""
    source = "comm/layer_<i>/dispatch_bytes, comm/layer_<i>/dispatch_bytes_vanilla, mean over steps"
    return _pairs("layer-bytes", "Expert-parallel traffic by layer", caption, bars, "layer", source)


def _pairs(
    name: str, title: str, caption: str, bars: Sequence[tuple[str, float, float]], what: str, source: str
) -> Figure:
    def draw(axes: Axes, palette: Palette) -> None:
        places = range(len(bars))
        axes.barh([p + 0.2 for p in places], [sent for _, sent, _ in bars], 0.38, color=palette.series(0), label="sent")
        vanilla = [vanilla for *_, vanilla in bars]
        axes.barh([p - 0.2 for p in places], vanilla, 0.38, color=palette.series(7), label="vanilla MoE")
        bar_labels(axes, [label for label, *_ in bars])
        axes.set_xlabel("bytes of rows between ranks per step")
        axes.set_ylabel(what)
        format_counts(axes.xaxis)
        legend(axes)

    rows = [(label, f"{sent:,.0f}", f"{vanilla:,.0f}", f"{1 - sent / vanilla:.1%}") for label, sent, vanilla in bars]
    return Figure(name, title, caption, draw, (what, "bytes", "vanilla bytes", "saved"), rows, source)


def _memory(run: Run) -> Figure | None:
    names = run.names(r"memory/(\w+)_bytes")
    curves = [Curve(name.replace("_", " "), *run.over(key, "tokens")) for name, key in names.items() if run.series(key)]
    if not curves:
        return None
    # Where there is an accelerator, its memory is what runs out.
    most = max([curve for curve in curves if curve.label != "host peak"] or curves, key=lambda curve: max(curve.y))
    half = most.y[len(most.y) // 2 :]
    grown = half[-1] / half[0] - 1 if half[0] else 0.0
    caption = (
        f"At most {compact(max(most.y))}B ({most.label}) on the fullest rank; {grown:+.1%} from the middle of the "
        "records to the last."
    )
    labels = (TOKENS, "bytes on the fullest rank")
    return curve_figure("memory", "Memory", caption, curves, labels, ", ".join(names.values()), 0)


def _norms(run: Run, of: str) -> Figure | None:
    names = run.names(rf"norm/{of}/(.+)")
    curves = [Curve(name, *run.over(key, "tokens")) for name, key in names.items() if run.series(key)]
    zero = [curve.label for curve in curves if max(curve.y) <= 0]
    curves = [curve for curve in curves if max(curve.y) > 0]
    if not curves:
        return None

    def draw(axes: Axes, palette: Palette) -> None:
        for number, curve in enumerate(curves):
            axes.plot(curve.x, curve.y, label=label_of(curve.label), linewidth=1.4, **palette.line(number))
        log_scale(axes.yaxis)
        axes.set_xlabel(TOKENS)
        axes.set_ylabel(f"{of} norm, logarithmic")
        format_counts(axes.xaxis)
        legend(axes)

    largest = max(curves, key=lambda curve: curve.y[-1])
    growth = max(curves, key=lambda curve: curve.y[-1] / max(curve.y[0], 1e-30))
    caption = (
        f"Largest at the end: {largest.label} ({largest.y[-1]:.3g}). Grown most since the first record: "
        f"{growth.label} ({growth.y[-1] / max(growth.y[0], 1e-30):.2g} times)."
    )
    caption += f" Left out, for they are 0 all along: {', '.join(zero)}." if zero else ""
    rows = [(curve.label, f"{curve.y[0]:.4g}", f"{curve.y[-1]:.4g}", f"{max(curve.y):.4g}") for curve in curves]
    header = ("module", "first", "last", "largest")
    title = f"{of.capitalize()} norms by module"
    return Figure(f"{of}-norms", title, caption, draw, header, rows, f"norm/{of}/<module>")

"""Losses on validation sets and results of benchmarks, of a run and of several beside each other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moepp.analysis.charts import TOKENS, compared_chart, curve_figure
from moepp.analysis.curves import Curve, curves_of, group_runs
from moepp.analysis.figures import Figure
from moepp.analysis.losses import benchmarks, validation_sets
from moepp.analysis.runs import SPLIT_NAME, Run

_LOSS = (TOKENS, "cross-entropy, nats per token")


def validation_charts(runs: Sequence[Run]) -> list[Figure]:
    """Return the losses on named validation sets, and the benchmarks that were evaluated during training."""
    if len(runs) == 1:
        return [figure for figure in (_sets_of(runs[0]), _benchmarks_of(runs[0])) if figure is not None]
    groups, figures = group_runs(runs), []
    for number, (name, key) in enumerate(validation_sets(runs).items()):
        names = (_file("loss", number, name), f"Loss on {name}")
        figures.append(compared_chart(names, curves_of(groups, key), "tokens", _LOSS, key))
    for number, (name, key) in enumerate(_main_metrics(benchmarks(runs)).items()):
        drawn = curves_of(groups, key)
        ends = sorted((curve.y[-1], curve.label) for _, curve in drawn.curves)
        caption = f"At the end of each from {ends[0][0]:.3f} ({ends[0][1]}) to {ends[-1][0]:.3f} ({ends[-1][1]})."
        caption += f"{drawn.remarks} All metrics of a benchmark are in the table of runs."
        labels, curves = (TOKENS, name.rpartition("/")[2]), [curve for _, curve in drawn.curves]
        figures.append(
            curve_figure(_file("benchmark", number, name), f"Benchmark {name}", caption, curves, labels, key)
        )
    return [figure for figure in figures if figure is not None]


def _file(kind: str, number: int, name: str) -> str:
    """Return a distinct name of a file, whatever a set is called in metrics.jsonl."""
    return f"{kind}-{number + 1}-{re.sub('[^A-Za-z0-9_-]+', '-', name)[:60]}"


def _main_metrics(found: Mapping[str, str]) -> dict[str, str]:
    """Return one metric of each task: the first of accuracy and exact match that it has, else its first."""
    by_task: dict[str, list[str]] = {}
    for name in found:
        by_task.setdefault(name.rpartition("/")[0], []).append(name)
    order = ("acc", "exact_match")
    main = [min(names, key=lambda name: _place(name, order)) for names in by_task.values()]
    return {name: found[name] for name in main}


def _place(name: str, order: Sequence[str]) -> int:
    metric = name.rpartition("/")[2]
    return order.index(metric) if metric in order else len(order)


def _curves(run: Run, keys: Mapping[str, str]) -> list[Curve]:
    return [Curve(name, *run.over(key, "tokens")) for name, key in keys.items()]


def _sets_of(run: Run) -> Figure | None:
    """Draw the validation sets of a run; None where there is but the split of its data."""
    named = validation_sets([run])
    if not named:  # the split is drawn beside the training loss
        return None
    keys = ({SPLIT_NAME: "eval/loss"} if run.series("eval/loss") else {}) | named
    curves = _curves(run, keys)
    ends = sorted((curve.y[-1], curve.label) for curve in curves)
    caption = f"Ends at {ends[0][0]:.3f} nats per token."
    if len(ends) > 1:
        caption = (
            f"Easiest at the end: {ends[0][1]} ({ends[0][0]:.3f} nats); hardest: {ends[-1][1]} ({ends[-1][0]:.3f})."
        )
    title = "Loss by validation set"
    return curve_figure("validation-sets", title, caption, curves, _LOSS, ", ".join(keys.values()))


def _benchmarks_of(run: Run) -> Figure | None:
    curves = _curves(run, benchmarks([run]))
    if not curves:
        return None
    rises = [f"{curve.label} {curve.y[0]:.3f} to {curve.y[-1]:.3f}" for curve in curves]
    caption = f"First to last: {'; '.join(rises)}."
    labels = (TOKENS, "value of the benchmark's metric")
    return curve_figure("benchmarks", "Benchmarks during training", caption, curves, labels, "eval/<task>/<metric>")

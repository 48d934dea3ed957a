"""Metrics as curves over tokens or operations, where runs that differ in their seed alone are one curve.

Nothing is left out of a curve without a word: see :class:`Drawn`. Letters: R runs of a group, P points of a curve.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from moepp.analysis.figures import compact
from moepp.analysis.runs import Run, compared_keys, setting_key
from moepp.config.compare import flatten

AXES = {
    "tokens": "training tokens",
    "operations": "floating-point operations, forward and backward",
    "expert operations": "operations of FFN experts, forward and backward",
}
"""What a curve can be drawn over, and how its axis is labelled."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed, what to call them, and their place, which is their colour."""

    label: str
    runs: tuple[Run, ...]
    number: int = 0


@dataclass(frozen=True)
class Curve:
    """A metric over an axis; of several seeds the mean at equal tokens.

    Attributes:
        label: what to call it.
        x, y: its points.
        spread: sample standard deviation over seeds at each point; None of one seed.
        seeds: how many it is the mean of.
        number: its colour on every chart; None: by its place in the chart.
        tokens: where it ends.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    seeds: int = 1
    number: int | None = None
    tokens: float = 0.0

    def at(self, x: float) -> float:
        """Return the value at ``x``, linear between points; the nearest end beyond them."""
        import numpy as np

        return float(np.interp(x, self.x, self.y))

    def spread_at(self, x: float) -> float | None:
        """Return the spread at ``x``, as :meth:`at`; None of one seed."""
        import numpy as np

        return None if self.spread is None else float(np.interp(x, self.x, self.spread))

    def reaches(self, y: float) -> float | None:
        """Return the first x at which the curve is at ``y`` or below; None if it never is."""
        for number, value in enumerate(self.y):
            if value > y:
                continue
            if number == 0:
                return float(self.x[0])
            before, left = self.y[number - 1], self.x[number - 1]
            return left + (self.x[number] - left) * (before - y) / (before - value)
        return None


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Return the runs by setting, in the order of the first run of each."""
    keys = compared_keys(runs)
    by_setting: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        # Runs whose configuration is not known are no siblings of anything.
        key = setting_key(run, keys) if run.settings else (str(run.path),)
        by_setting.setdefault(key, []).append(run)
    members = list(by_setting.values())
    labels = [_label(group) for group in members]
    if len(set(labels)) < len(labels):
        labels = _distinct(labels, members)
    pairs = zip(labels, members, strict=True)
    return [Group(label, tuple(group), number) for number, (label, group) in enumerate(pairs)]


def same_seeds(runs: Sequence[Run]) -> list[list[str]]:
    """Return the names of runs that are of one setting and have one seed: repetitions tell nothing of other seeds."""
    found: dict[tuple[int, Any], list[str]] = {}
    for group in group_runs(runs):
        for run in group.runs:
            if run.settings:
                found.setdefault((group.number, flatten(run.settings).get("run.seed")), []).append(run.name)
    return [names for names in found.values() if len(names) > 1]


def _label(runs: Sequence[Run]) -> str:
    """Return a run's name, or what the names of several have in common: "moepp-seed-1", "moepp-seed-2": "moepp"."""
    if len(runs) == 1:
        return runs[0].name
    ends = zip(*(reversed(run.name.split("/")) for run in runs), strict=False)
    if end := [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, ends)]:  # a folder for each seed
        return "/".join(reversed(end))
    letters = takewhile(lambda column: len(set(column)) == 1, zip(*(run.name for run in runs), strict=False))
    common = "".join(column[0] for column in letters)
    common = re.sub(r"[-_.=](seed|s)?[-_.=]?[0-9]*$", "", common).rstrip("-_.=/")
    return common or ", ".join(run.name for run in runs)


def _distinct(labels: Sequence[str], members: Sequence[Sequence[Run]]) -> list[str]:
    names = [", ".join(run.name for run in group) for group in members]
    return [names[n] if labels.count(label) > 1 else label for n, label in enumerate(labels)]


@dataclass(frozen=True)
class Drawn:
    """Curves of groups with the runs that they are of, and what is not in them, each as the end of a sentence."""

    curves: list[tuple[Group, Curve]]
    left_out: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    @property
    def remarks(self) -> str:
        """What a caption must say, each sentence after a blank; "" where everything is drawn whole."""
        parts = [f" Left out: {'; '.join(self.left_out)}."] if self.left_out else []
        return "".join([*parts, *(f" {text}." for text in self.cut)])


def curve_of(group: Group, metric: str, axis: str = "tokens") -> tuple[Group, Curve] | None:
    """Return a group's curve, with the runs that it is of; None where it has none: see :func:`curves_of`."""
    curves = curves_of([group], metric, axis).curves
    return curves[0] if len(curves) == 1 else None


def curves_of(groups: Sequence[Group], metric: str, axis: str = "tokens") -> Drawn:
    """Return the curves of the groups, and what of them could not be drawn.

    A curve of several seeds is their mean at equal tokens, at the records of the first, as far as all of them have got;
    a seed that has not got half as far as the longest is no part of it. Seeds without common tokens are drawn alone.
    """
    drawn = Drawn([])
    for group in groups:
        _add(drawn, group, metric, axis)
    return drawn


def _add(drawn: Drawn, group: Group, metric: str, axis: str) -> None:
    runs = [run for run in group.runs if run.series(metric)]
    on_axis = [run for run in runs if run.over(metric, axis)[0]]
    ends = {run.path: run.series(metric).tokens[-1] for run in on_axis}
    far = [run for run in on_axis if 2 * ends[run.path] >= max(ends.values())]
    for run in group.runs:
        if all(run is not one for one in runs):
            drawn.left_out.append(f"{run.name} (no {metric})")
        elif all(run is not one for one in on_axis):
            drawn.left_out.append(f"{run.name} ({axis} not known)")
        elif all(run is not one for one in far):
            drawn.left_out.append(f"{run.name} (a seed that is only at {compact(ends[run.path])} tokens)")
    if not far:
        return
    if (curve := _mean_curve(group, far, metric, axis)) is not None:
        drawn.curves.append((replace(group, runs=tuple(far)), curve))
        shortest, longest = (order(far, key=lambda run: ends[run.path]) for order in (min, max))
        if ends[shortest.path] < ends[longest.path]:
            drawn.cut.append(
                f"{group.label} is drawn to {compact(ends[shortest.path])} tokens, where {shortest.name} ends"
            )
        return
    for run in far:
        drawn.curves.append((Group(run.name, (run,), group.number), _single(run.name, run, metric, axis, group.number)))
    drawn.cut.append(f"The seeds of {group.label} have no tokens in common, so each is drawn alone")


def _single(label: str, run: Run, metric: str, axis: str, number: int) -> Curve:
    return Curve(label, *run.over(metric, axis), number=number, tokens=run.series(metric).tokens[-1])


def _mean_curve(group: Group, runs: Sequence[Run], metric: str, axis: str) -> Curve | None:
    """Return the mean of runs at equal tokens; None where they have none in common."""
    some = f"{len(runs)} of {len(group.runs)}" if len(runs) < len(group.runs) else str(len(runs))
    if len(runs) == 1:
        label = group.label if len(group.runs) == 1 else f"{group.label} ({some} seeds)"
        return _single(label, runs[0], metric, axis, group.number)
    import numpy as np

    series = [run.series(metric) for run in runs]
    first, last = max(one.tokens[0] for one in series), min(one.tokens[-1] for one in series)
    if first > last:
        return None
    tokens = [value for value in series[0].tokens if first <= value <= last]
    if not tokens or tokens[-1] < last:
        tokens.append(last)
    pairs = list(zip(runs, series, strict=True))
    x_RP = np.array([np.interp(tokens, one.tokens, run.over(metric, axis)[0]) for run, one in pairs])
    values_RP = np.array([np.interp(tokens, one.tokens, one.values) for one in series])
    spread = values_RP.std(axis=0, ddof=1).tolist()
    mean_x, mean = x_RP.mean(axis=0).tolist(), values_RP.mean(axis=0).tolist()
    return Curve(f"{group.label} ({some} seeds)", mean_x, mean, spread, len(runs), group.number, last)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation; None of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def short_setting(run: Run, keys: Sequence[str]) -> str:
    """Return a run's values of these keys in few letters: "tau=0.5"."""
    flat = flatten(run.settings)
    return ", ".join(f"{key.rsplit('.', 1)[-1]}={flat.get(key, 'absent')}" for key in keys)

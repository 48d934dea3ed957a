"""Metrics as curves over tokens or operations, where runs that differ in their seed alone are one curve.

Letters: R runs of a group, P points of a curve.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from moepp.analysis.runs import Run, compared_keys, setting
from moepp.config.compare import flatten

AXES = {
    "tokens": "training tokens",
    "operations": "floating-point operations, forward and backward",
    "expert operations": "operations of FFN experts, forward and backward",
}
"""What a curve can be drawn over, and how its axis is labelled."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed, and what to call them."""

    label: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Curve:
    """A metric over an axis; of several seeds the mean, with the sample standard deviation at each point."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None

    def at(self, x: float) -> float:
        """Return the value at ``x``, linear between points; the nearest end beyond them."""
        import numpy as np

        return float(np.interp(x, self.x, self.y))

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
    by_setting: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        # Runs whose configuration is not known are no siblings of anything.
        key = setting(run, keys) if run.settings else (str(run.path),)
        by_setting.setdefault(key, []).append(run)
    members = list(by_setting.values())
    labels = [_label(group) for group in members]
    if len(set(labels)) < len(labels):
        labels = _distinct(labels, members)
    return [Group(label, tuple(group)) for label, group in zip(labels, members, strict=True)]


def _label(runs: Sequence[Run]) -> str:
    """Return a run's name, or what the names of several have in common: "moepp-seed-1", "moepp-seed-2": "moepp"."""
    if len(runs) == 1:
        return runs[0].name
    letters = takewhile(lambda column: len(set(column)) == 1, zip(*(run.name for run in runs), strict=False))
    common = "".join(column[0] for column in letters)
    common = re.sub(r"[-_.=](seed|s)?[-_.=]?[0-9]*$", "", common).rstrip("-_.=")
    return common or ", ".join(run.name for run in runs)


def _distinct(labels: Sequence[str], members: Sequence[Sequence[Run]]) -> list[str]:
    names = [", ".join(run.name for run in group) for group in members]
    if len(set(names)) < len(names):  # the same names in several folders
        names = [", ".join(f"{run.path.parent.name}/{run.name}" for run in group) for group in members]
    return [names[n] if labels.count(label) > 1 else label for n, label in enumerate(labels)]


def curve_of(group: Group, metric: str, axis: str = "tokens") -> Curve | None:
    """Return a group's curve; None where no run has the metric, or the axis is not known of one that has.

    Of several runs it covers what all of them cover, at the points of the first; their values are linear between
    records.
    """
    drawn = [run.over(metric, axis) for run in group.runs if run.series(metric)]
    if not drawn or not all(x for x, _ in drawn):
        return None
    if len(drawn) == 1:
        return Curve(group.label, *drawn[0])
    import numpy as np

    first, last = max(x[0] for x, _ in drawn), min(x[-1] for x, _ in drawn)
    if first > last:
        return None
    x = [value for value in drawn[0][0] if first <= value <= last]
    if not x or x[-1] < last:
        x.append(last)
    values_RP = np.array([np.interp(x, *points) for points in drawn])
    spread = values_RP.std(axis=0, ddof=1).tolist()
    return Curve(f"{group.label} ({len(drawn)} seeds)", x, values_RP.mean(axis=0).tolist(), spread)


def curves_of(groups: Sequence[Group], metric: str, axis: str = "tokens") -> list[tuple[Group, Curve]]:
    """Return the curves of the groups that have one."""
    found = ((group, curve_of(group, metric, axis)) for group in groups)
    return [(group, curve) for group, curve in found if curve is not None]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation; None of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def short_setting(run: Run, keys: Sequence[str]) -> str:
    """Return a run's values of these keys in few letters: "tau=0.5"."""
    flat = flatten(run.settings)
    return ", ".join(f"{key.rsplit('.', 1)[-1]}={flat.get(key, 'absent')}" for key in keys)

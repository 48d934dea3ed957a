"""Settings against a baseline, such as MoE++ against its vanilla twin: at equal tokens and at equal operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from moepp.analysis.charts import compared_loss, tokens_per_second
from moepp.analysis.curves import AXES, Curve, Group, curve_of, group_runs, mean_and_spread, short_setting
from moepp.analysis.figures import Figure, Palette, compact, format_counts
from moepp.analysis.runs import Run, compared_keys
from moepp.model.accounting import activated_parameters

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TAU = "model.moe.tau"


def baseline_of(groups: Sequence[Group]) -> Group | None:
    """Return the first setting without zero-computation experts, the vanilla MoE; None where there is none."""
    for group in groups:
        config = group.runs[0].config
        if config is not None and config.model.moe_layers and not config.model.moe.num_zero_computation_experts:
            return group
    return None


def differences(runs: Sequence[Run]) -> tuple[Group, list[dict[str, Any]]] | None:
    """Return the vanilla twin and a row for each other setting; None without a twin or without others.

    Columns: setting; against (the twin); ``loss_at_equal_<axis>``: loss minus the twin's, nats, at the largest x that
    both reach, with ``_error``, its standard error over seeds; ``ratio_<what>``: the setting's over the twin's, per
    token.
    """
    groups = group_runs(runs)
    twin = baseline_of(groups)
    others = [group for group in groups if group is not twin]
    if twin is None or not others:
        return None
    metric = compared_loss(runs)
    return twin, [_difference(group, twin, metric) for group in others]


def _difference(group: Group, twin: Group, metric: str) -> dict[str, Any]:
    row: dict[str, Any] = {"setting": group.label, "against": twin.label}
    for axis in AXES:
        name = f"loss_at_equal_{axis.replace(' ', '_')}"
        ours, theirs = curve_of(group, metric, axis), curve_of(twin, metric, axis)
        difference, error = None, None
        if ours is not None and theirs is not None:
            at = min(ours.x[-1], theirs.x[-1])
            if at >= max(ours.x[0], theirs.x[0]):
                difference = ours.at(at) - theirs.at(at)
                error = _error(((ours, len(group.runs)), (theirs, len(twin.runs))), at)
        row |= {name: difference, f"{name}_error": error}
    for what, of in _PER_TOKEN.items():
        ours, theirs = _mean(group, of), _mean(twin, of)
        row[f"ratio_{what}"] = ours / theirs if ours is not None and theirs else None
    return row


def _error(curves: Sequence[tuple[Curve, int]], at: float) -> float | None:
    """Return the standard error of a difference of two means; None where one of them is a single run."""
    if any(curve.spread is None for curve, _ in curves):
        return None
    import numpy as np

    parts = [float(np.interp(at, curve.x, curve.spread or ())) ** 2 / runs for curve, runs in curves]
    return math.sqrt(sum(parts))


def _expert_operations(run: Run) -> float | None:
    return run.expert_flops.values[-1] / run.expert_flops.tokens[-1] if run.expert_flops else None


def _operations(run: Run) -> float | None:
    return run.flops.values[-1] / run.flops.tokens[-1] if run.flops else None


def _bytes(run: Run) -> float | None:
    return None if run.bytes_sent is None else run.bytes_sent[0] / (run.tokens / max(run.steps, 1))


_PER_TOKEN = {
    "expert_operations": _expert_operations,
    "operations": _operations,
    "tokens_per_second": tokens_per_second,
    "bytes": _bytes,
}


def _mean(group: Group, of: Any) -> float | None:
    values = [value for run in group.runs if (value := of(run)) is not None]
    return mean_and_spread(values)[0] if values else None


@dataclass(frozen=True)
class _Point:
    """A setting in the plane of cost and loss."""

    label: str
    cost: float  # parameters that a token uses
    operations: float | None
    loss: float
    spread: float | None


def frontier(runs: Sequence[Run]) -> Figure | None:
    """Draw the loss against the parameters that a token uses: what lies low and left wins.

    The loss is that at the largest number of tokens that all settings reach, the cost the mean up to there.
    """
    metric = compared_loss(runs)
    keys = [key for key in compared_keys(runs) if key == _TAU]
    found = [(group, curve) for group in group_runs(runs) if (curve := curve_of(group, metric)) is not None]
    found = [(group, curve) for group, curve in found if _used_parameters(group) is not None]
    if len(found) < 2:
        return None
    at = min(curve.x[-1] for _, curve in found)
    if at < max(curve.x[0] for _, curve in found):
        return None
    points = [_point(group, curve, at, keys) for group, curve in found]
    points.sort(key=lambda point: (point.cost, point.loss))
    best = [points[0]]
    for point in points[1:]:
        if point.loss < best[-1].loss:
            best.append(point)

    def draw(axes: Axes, palette: Palette) -> None:
        axes.plot([point.cost for point in best], [point.loss for point in best], color=palette["muted"], linewidth=1)
        for point in points:
            colour = palette.series(0 if point in best else 7)
            axes.errorbar([point.cost], [point.loss], yerr=point.spread, fmt="o", color=colour, capsize=3)
            place = {"textcoords": "offset points", "xytext": (5, 5), "fontsize": 8}
            axes.annotate(point.label, (point.cost, point.loss), **place)
        axes.margins(0.18)
        axes.set_xlabel("parameters used per token, input embedding left out")
        axes.set_ylabel("loss, nats per token")
        format_counts(axes.xaxis)

    rows = []
    for point in points:
        operations = "-" if point.operations is None else compact(point.operations)
        spread = "-" if point.spread is None else f"{point.spread:.4f}"
        rows.append((point.label, compact(point.cost), operations, f"{point.loss:.4f}", spread))
    header = ("setting", "parameters used per token", "operations per token", "loss", "± over seeds")
    caption = f"At {compact(at)} tokens, the furthest that all reach. {_gains(best)}"
    source = f"{metric}, routing/ffn_per_token and config.yaml"
    return Figure("frontier", "Loss against parameters used", caption, draw, header, rows, source)


def _point(group: Group, curve: Curve, at: float, keys: Sequence[str]) -> _Point:
    config = group.runs[0].config
    has_tau = config is not None and config.model.moe.num_zero_computation_experts
    label = f"{group.label} ({short_setting(group.runs[0], keys)})" if keys and has_tau else group.label
    spread = None
    if curve.spread is not None:
        import numpy as np

        spread = float(np.interp(at, curve.x, curve.spread))
    return _Point(label, _used_parameters(group) or 0.0, _mean(group, _operations), curve.at(at), spread)


def _used_parameters(group: Group) -> float | None:
    return _mean(group, _used)


def _used(run: Run) -> float | None:
    if run.config is None:
        return None
    ffn = run.series("routing/ffn_per_token")
    if run.config.model.moe_layers and not ffn:
        return None
    # Of the whole run, weighed by tokens: that is what its operations per token say.
    before, total = 0, 0.0
    for tokens, per_token in zip(ffn.tokens, ffn.values, strict=True):
        total, before = total + (tokens - before) * per_token, tokens
    return activated_parameters(run.config.model, total / before if before else 0.0, include_embedding=False)


def _gains(best: Sequence[_Point]) -> str:
    if len(best) == 1:
        return f"{best[0].label} is both the cheapest and the best."
    gains = [
        f"{a.label} to {b.label}: {a.loss - b.loss:.3f} nats for {b.cost / a.cost:.2f} times the parameters"
        for a, b in pairwise(best)
    ]
    return f"No setting is both cheaper and better than those on the line. {'; '.join(gains)}."

"""Settings against their vanilla twins, which lack zero-computation experts: at equal tokens and equal operations."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from moepp.analysis.charts import behind_text, estimate, far_enough, tokens_per_second
from moepp.analysis.curves import AXES, Curve, Group, curve_of, curves_of, group_runs, mean_and_spread, short_setting
from moepp.analysis.evidence import Estimate, standard_error, verdict
from moepp.analysis.figures import NUM_SERIES, Figure, Palette, compact, format_counts, label_of, legend
from moepp.analysis.losses import compared_loss, loss_name
from moepp.analysis.runs import Run, compared_keys
from moepp.model.accounting import FlopsPerToken, activated_parameters, flops_per_token

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TAU = "model.moe.tau"
# In what a vanilla twin differs from MoE++: the experts that it lacks, what belongs to them, and gating residuals.
_TWIN = re.compile(
    r"model\.(constant_init_std|moe\.(num_(zero|copy|constant)_experts|extra_experts\..*|tau|gating_residual))"
)
_TOLD = 4  # settings on the line of which each step is told
_MARKERS = ("o", "s", "^", "D")  # colours repeat, the pair does not for 32 points


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row for each setting against its vanilla twin; [] without a twin or without others.

    The twin of a setting has no zero-computation experts and differs from it in the fewest other keys. Settings that
    are nobody's twin have a row too.

    Columns: setting; seeds of it; against (the twin); also_differs_in (keys in which a twin should not differ; None if
    there are none); ``loss_at_equal_<axis>``: loss minus the twin's, nats, at the largest x that both reach, with
    ``_error``, its standard error over seeds; ``ratio_<what>``: the setting's over the twin's, per token, up to the
    furthest tokens that both reach.
    """
    groups = group_runs(runs)
    vanilla = [group for group in groups if _is_vanilla(group)]
    pairs = {group.number: _twin_of(group, vanilla) for group in groups if vanilla and not _is_vanilla(group)}
    twins = [group for group in vanilla if any(twin is group for twin, _ in pairs.values())]
    if not twins:
        return []
    pairs |= {group.number: _twin_of(group, twins) for group in vanilla if all(group is not twin for twin in twins)}
    metric = compared_loss(runs)
    return [_difference(group, *pairs[group.number], metric) for group in groups if group.number in pairs]


def _is_vanilla(group: Group) -> bool:
    config = group.runs[0].config
    return config is not None and bool(config.model.moe_layers) and not config.model.moe.num_zero_computation_experts


def _twin_of(group: Group, vanilla: Sequence[Group]) -> tuple[Group, list[str]]:
    """Return the nearest of the vanilla settings, and the keys in which it differs though a twin need not."""
    keys = [
        [key for key in compared_keys([group.runs[0], twin.runs[0]]) if not _TWIN.fullmatch(key)] for twin in vanilla
    ]
    # What is trained and how comes before how its MoE layers are made.
    distance = [(sum(not key.startswith("model.moe.") for key in differing), len(differing)) for differing in keys]
    nearest = distance.index(min(distance))
    return vanilla[nearest], keys[nearest]


def _difference(group: Group, twin: Group, differing: Sequence[str], metric: str) -> dict[str, Any]:
    also = ", ".join(differing) if group.runs[0].settings else "its configuration is not known"
    row: dict[str, Any] = {"setting": group.label, "seeds": len(group.runs), "against": twin.label}
    row["also_differs_in"] = also or None
    runs, twins, until = group.runs, twin.runs, None  # over which costs are means
    for axis in AXES:
        name = f"loss_at_equal_{axis.replace(' ', '_')}"
        difference, error = None, None
        drawn, drawn_twin = curve_of(group, metric, axis), curve_of(twin, metric, axis)
        if drawn is not None and drawn_twin is not None:
            ours, theirs = drawn[1], drawn_twin[1]
            at = min(ours.x[-1], theirs.x[-1])
            if at >= max(ours.x[0], theirs.x[0]):
                difference = ours.at(at) - theirs.at(at)
                error = standard_error(estimate(ours, at), estimate(theirs, at))
                if axis == "tokens":
                    runs, twins, until = drawn[0].runs, drawn_twin[0].runs, at
        row |= {name: difference, f"{name}_error": error}
    for what, of in _PER_TOKEN.items():
        cost, cost_of_twin = _mean(runs, of, until), _mean(twins, of, until)
        row[f"ratio_{what}"] = cost / cost_of_twin if cost is not None and cost_of_twin else None
    return row


def _ffn_per_token(run: Run, until: float | None) -> float | None:
    """Return the mean number of FFN experts that a token uses in an MoE layer, over the first ``until`` tokens."""
    if run.config is None:
        return None
    return run.series("routing/ffn_per_token").until(until).mean if run.config.model.moe_layers else 0.0


def _flops(run: Run, until: float | None) -> FlopsPerToken | None:
    ffn = _ffn_per_token(run, until)
    if ffn is None or run.config is None:
        return None
    return flops_per_token(run.config.model, run.config.data.seq_len, ffn)


def _expert_operations(run: Run, until: float | None) -> float | None:
    flops = _flops(run, until)
    return None if flops is None else flops.ffn_experts or None


def _operations(run: Run, until: float | None) -> float | None:
    flops = _flops(run, until)
    return None if flops is None else flops.forward_backward


def _bytes(run: Run, until: float | None) -> float | None:
    per_step = run.series("comm/dispatch_bytes").until(until).mean
    return None if per_step is None else per_step / (run.tokens / max(run.steps, 1))


def _used(run: Run, until: float | None) -> float | None:
    ffn = _ffn_per_token(run, until)
    if ffn is None or run.config is None:
        return None
    return activated_parameters(run.config.model, ffn, include_embedding=False)


Cost = Callable[[Run, "float | None"], "float | None"]
"""Returns what a token costs a run, the mean over this many tokens or (None) over all; None if that is not known."""

_PER_TOKEN: dict[str, Cost] = {
    "expert_operations": _expert_operations,
    "operations": _operations,
    "tokens_per_second": tokens_per_second,
    "bytes": _bytes,
}


def _mean(runs: Sequence[Run], of: Cost, until: float | None) -> float | None:
    values = [value for run in runs if (value := of(run, until)) is not None]
    return mean_and_spread(values)[0] if values else None


@dataclass(frozen=True)
class _Point:
    """A setting in the plane of cost and loss."""

    loss: Estimate
    cost: float  # parameters that a token uses
    operations: float | None
    number: int  # its colour

    @property
    def label(self) -> str:
        """What to call it."""
        return self.loss.label


def frontier(runs: Sequence[Run]) -> Figure | None:
    """Draw the loss against the parameters that a token uses: what lies low and left wins.

    The loss is that at the largest number of tokens that all settings reach which are half as far as the longest, costs
    are means up to there. None with fewer than two of them.
    """
    metric = compared_loss(runs)
    keys = [key for key in compared_keys(runs) if key == _TAU]
    drawn = curves_of(group_runs(runs), metric)
    without = [curve.label for group, curve in drawn.curves if _mean(group.runs, _used, None) is None]
    far, behind = far_enough([curve for _, curve in drawn.curves] or [Curve("", [0.0], [0.0])])
    names = {curve.label for curve in far}
    found = [(group, curve) for group, curve in drawn.curves if curve.label in names and curve.label not in without]
    if len(found) < 2:
        return None
    at = min(curve.x[-1] for _, curve in found)
    if at < max(curve.x[0] for _, curve in found):
        return None
    points = sorted((_point(group, curve, at, keys) for group, curve in found), key=lambda p: (p.cost, p.loss.value))
    best = [points[0]]
    for point in points[1:]:
        if point.loss.value < best[-1].loss.value:
            best.append(point)
    drawn.left_out.extend(f"{label} (its cost is not known)" for label in without)
    caption = f"At {compact(at)} tokens, the furthest that {'all' if not behind else 'those compared'} reach. "
    caption += _gains(best) + behind_text(behind) + drawn.remarks
    header = ("setting", "parameters used per token", "operations per token", "loss", "± over seeds")
    source = f"{metric}, routing/ffn_per_token and config.yaml"
    title = "Loss against parameters used"
    return Figure(
        "frontier",
        title,
        caption,
        _draw_frontier(points, best, loss_name(metric)),
        header,
        [_row(p) for p in points],
        source,
    )


def _row(point: _Point) -> tuple[str, ...]:
    operations = "-" if point.operations is None else compact(point.operations)
    spread = "-" if point.loss.spread is None else f"{point.loss.spread:.4f}"
    return point.label, compact(point.cost), operations, f"{point.loss.value:.4f}", spread


def _draw_frontier(points: Sequence[_Point], best: Sequence[_Point], loss: str) -> Callable[[Axes, Palette], None]:
    def draw(axes: Axes, palette: Palette) -> None:
        line = [point.cost for point in best], [point.loss.value for point in best]
        axes.plot(*line, color=palette["muted"], linewidth=1, zorder=1)
        for point in points:
            style = {"fmt": _MARKERS[point.number // NUM_SERIES % len(_MARKERS)], "capsize": 3}
            colour = palette.series(point.number)
            place = [point.cost], [point.loss.value]
            axes.errorbar(*place, yerr=point.loss.spread, color=colour, label=label_of(point.label), **style)
        axes.margins(0.08)
        axes.set_xlabel("parameters used per token, input embedding left out")
        axes.set_ylabel(f"{loss}, nats per token")
        format_counts(axes.xaxis)
        legend(axes)

    return draw


def _point(group: Group, curve: Curve, at: float, keys: Sequence[str]) -> _Point:
    config = group.runs[0].config
    has_tau = config is not None and config.model.moe.num_zero_computation_experts
    label = f"{curve.label} ({short_setting(group.runs[0], keys)})" if keys and has_tau else curve.label
    loss = replace(estimate(curve, at), label=label)
    cost = _mean(group.runs, _used, at)
    return _Point(loss, cost or 0.0, _mean(group.runs, _operations, at), group.number)


def _gains(best: Sequence[_Point]) -> str:
    if len(best) == 1:
        return f"By the means, {best[0].label} is both the cheapest and the best."
    line = "By the means, no setting is both cheaper and better than those on the line."
    if len(best) > _TOLD:
        steps, start = [(best[0], best[-1])], f"{line} {len(best)} lie on it. The cheapest and the best: "
    else:
        steps, start = list(pairwise(best)), f"{line} "
    gains = [
        f"{a.label} to {b.label}: {a.loss.value - b.loss.value:.3f} nats for {b.cost / a.cost:.2f} times the "
        f"parameters ({verdict(a.loss, b.loss)})"
        for a, b in steps
    ]
    return f"{start}{'; '.join(gains)}."

"""Shares of expert kinds by evaluation task: what ``moepp eval`` and evaluations during training have counted."""

from __future__ import annotations

import math
from pathlib import Path

from moepp.analysis.runs import Run
from moepp.analysis.token_tables import Rows
from moepp.analysis.token_view import layer_indices
from moepp.errors import RunError
from moepp.evaluation.results import read_results


def task_kinds(run: Run) -> tuple[Rows, str, list[str]]:
    """Return rows as those of :func:`moepp.analysis.token_tables.kinds_by_layer`, where they are from, and remarks.

    The newest results of each task count: those of ``eval/*.json``, layer by layer; of tasks that only training has
    evaluated, or at a later step, the last record, whose shares are means over layers (``layer`` is None).
    """
    rows: Rows = []
    logged = _logged(run)
    found: dict[str, str] = {}
    remarks = []
    for path in sorted((run.path / "eval").glob("*.json"), reverse=True):  # the newest step first, then the time
        try:
            results = read_results(path)
        except RunError as error:
            remarks.append(f"Expert kinds by task: {error}")
            continue
        for result in results:
            is_older = result.name in logged and _step(path) < logged[result.name][0]
            if result.kinds and result.name not in found and not is_older:
                found[result.name] = f"eval/{path.name}"
                own = run.config.model.moe_layers if run.config is not None else ()
                count = len(next(iter(result.kinds.values())))
                rows += [
                    {"source": result.name, "layer": layer, "tokens": result.tokens}
                    | {kind: shares[row] for kind, shares in result.kinds.items()}
                    for row, layer in enumerate(layer_indices(result.layers or own, count))
                ]
    own = [(task, shares) for task, (_, shares) in logged.items() if task not in found]
    rows += [{"source": task, "layer": None, "tokens": None} | shares for task, shares in own]
    places = [*dict.fromkeys(found.values()), *(["eval/<task>/share_<kind>"] if logged.keys() - found.keys() else [])]
    return rows, ", ".join(places), remarks


def _step(path: Path) -> float:
    """Return the step of the checkpoint that was evaluated, which the file's name says; of weights without one none."""
    step = path.name.partition("-")[0]
    return int(step) if step.isdecimal() and step.isascii() else math.inf


def _logged(run: Run) -> dict[str, tuple[int, dict[str, float]]]:
    """Return the step and the shares of each kind that were logged last, by task."""
    found: dict[str, tuple[int, dict[str, float]]] = {}
    for name, key in run.names(r"eval/(.{1,200}/share_\w{1,60})").items():
        task, _, kind = name.rpartition("/share_")
        known = [record for record in run.records if record.get(key) is not None]
        if known:
            _, shares = found.get(task, (0, {}))
            found[task] = known[-1]["step"], shares | {kind: float(known[-1][key])}
    return {task: (step, shares) for task, (step, shares) in found.items() if "ffn" in shares}

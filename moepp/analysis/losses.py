"""Which losses and benchmarks runs have, and which loss compares them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moepp.analysis.runs import Run

TRAINING, VALIDATION = "train/loss", "eval/loss"
_SET = re.compile(r"eval/(.+)/loss")
_BENCHMARK = r"eval/(.+/(?!loss$|perplexity$)(?!\w*stderr|share_)[^/]+)"


def compared_loss(runs: Sequence[Run]) -> str:
    """Return the metric that compares runs: on held-out data, which does not flatter, where all far enough have one.

    That is the validation part of ``data.paths``, else the first set of ``data.validation`` that all of them have, else
    the training loss. Far enough are runs that have got half as far as the longest.
    """
    trained = [run for run in runs if run.series(TRAINING)] or list(runs)
    furthest = max((run.tokens for run in trained), default=0)
    far = [run for run in trained if 2 * run.tokens >= furthest]
    held_out = (VALIDATION, *validation_sets(far).values())
    return next((metric for metric in held_out if all(run.series(metric) for run in far)), TRAINING)


def loss_name(metric: str) -> str:
    """Return what a loss is called: "training loss", "validation loss" or "loss on wiki"."""
    found = _SET.fullmatch(metric)
    return f"loss on {found[1]}" if found else {TRAINING: "training loss", VALIDATION: "validation loss"}[metric]


def validation_sets(runs: Sequence[Run]) -> dict[str, str]:
    """Return the metrics of the losses on sets of ``data.validation`` by their names, of all runs that have values."""
    return _with_values(runs, _SET.pattern)


def benchmarks(runs: Sequence[Run]) -> dict[str, str]:
    """Return the metrics of benchmarks, ``<task>/<metric>``, of all runs that have values."""
    return _with_values(runs, _BENCHMARK)


def _with_values(runs: Sequence[Run], pattern: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for run in runs:
        found |= {name: key for name, key in run.names(pattern).items() if run.series(key)}
    return found

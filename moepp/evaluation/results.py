"""What an evaluation found: per-benchmark numbers, the table, the file in the run directory."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moepp.errors import RunError
from moepp.evaluation.names import TITLES
from moepp.io import files
from moepp.io.untrusted import printable, read_json

_MAX_TEXT = 2000

# Metrics that are 1 or 0 for each document, and how the table heads them. The first of these is a benchmark's score.
ACCURACIES = {"acc": "accuracy", "exact_match": "exact match", "acc_norm": "accuracy, length-normalised"}


@dataclass(frozen=True)
class BenchmarkResult:
    """One line of the table.

    Attributes:
        name: the harness's task or group.
        metrics: name -> value; accuracies are fractions.
        stderr: of the accuracies.
        chance: accuracy of guessing at random; None where there is no accuracy.
        shots: examples in the prompt.
        documents: evaluated documents.
        requests: sequences that were scored or continued.
        truncated: requests whose beginning did not fit the model.
        origin, notes: of the documents.
        tasks: metrics of each task, where there are several.
        tokens: that were read, without padding; 0 of a model without MoE layers.
        kinds: share of each expert kind in the choices of a MoE layer, by layer.
        layers: index of the transformer layer of each of them; [] in files of earlier versions.
    """

    name: str
    metrics: dict[str, float]
    stderr: dict[str, float]
    chance: float | None
    shots: int
    documents: int
    requests: int
    truncated: int
    origin: str
    notes: tuple[str, ...] = ()
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    tokens: int = 0
    kinds: dict[str, list[float]] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name)

    @property
    def mean_kinds(self) -> dict[str, float]:
        """Share of each expert kind, mean over layers."""
        return {kind: sum(shares) / len(shares) for kind, shares in self.kinds.items()}

    @property
    def score(self) -> str | None:
        """The main metric of this benchmark."""
        return next((name for name in ACCURACIES if name in self.metrics), None)


def read_results(path: Path) -> list[BenchmarkResult]:
    """Results that :func:`write_results` wrote.

    Raises:
        RunError: the file cannot be read, or holds something else.
    """
    content = read_json(path, error=RunError, remedy="remove it")
    try:
        return [_result_from(tree) for tree in content["results"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is not a file that `moepp eval` wrote ({printable(error, 200)}); remove it") from error


def _result_from(tree: dict[str, Any]) -> BenchmarkResult:
    result = BenchmarkResult(**{**tree, "notes": tuple(tree["notes"])})
    counts = (result.shots, result.documents, result.requests, result.truncated, result.tokens)
    numbers = [*result.metrics.values(), *result.stderr.values()] + ([] if result.chance is None else [result.chance])
    texts = [result.name, result.origin, *result.notes, *result.metrics, *result.stderr, *result.kinds]
    layers = [list(shares) for shares in result.kinds.values()]
    if not all(type(share) in (int, float) and 0 <= share <= 1 for shares in layers for share in shares):
        raise ValueError("a share of an expert kind is not between 0 and 1")
    if len({len(shares) for shares in layers}) > 1 or [] in layers:
        raise ValueError("expert kinds have not equally many layers")
    if result.layers and any(len(result.layers) != len(shares) for shares in layers):
        raise ValueError("there are not as many layers as shares of expert kinds")
    if not all(type(count) is int and 0 <= count < 1 << 60 for count in (*counts, *result.layers)):
        raise ValueError("a count is no integer of 0 or more")
    if not all(type(number) in (int, float, type(None)) for number in numbers):
        raise ValueError("a metric is no number")
    if not all(isinstance(text, str) and text.isprintable() and len(text) < _MAX_TEXT for text in texts):
        raise ValueError("a name or note is no line of text")
    read = {key: math.nan if value is None else value for key, value in result.metrics.items()}
    errors = {key: math.nan if value is None else value for key, value in result.stderr.items()}
    return replace(result, metrics=read, stderr=errors)


@dataclass(frozen=True)
class Subject:
    """What was evaluated.

    Attributes:
        source: run directory, checkpoint or folder, as named by the user.
        step, tokens: of the checkpoint; None for folders in another format.
    """

    source: str
    step: int | None = None
    tokens: int | None = None


def flat_metrics(results: Sequence[BenchmarkResult]) -> dict[str, float]:
    """``eval/<task>/<metric>`` and ``eval/<task>/share_<expert kind>`` -> value, for metric records."""
    metrics = {f"eval/{r.name}/{metric}": value for r in results for metric, value in r.metrics.items()}
    return metrics | {f"eval/{r.name}/share_{kind}": v for r in results for kind, v in r.mean_kinds.items()}


def accuracy_stderr(accuracies: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the standard error of an accuracy over the documents of one or more tasks; NaN for one document each.

    With one task the sample standard deviation of zeros and ones over sqrt(n); with several the pooled one, as the
    harness's groups have it.
    """
    free = sum(sizes) - len(sizes)
    if free == 0:
        return math.nan
    squares = sum(size * p * (1 - p) for p, size in zip(accuracies, sizes, strict=True))
    return math.sqrt(squares / free / sum(sizes))


def table_text(results: Sequence[BenchmarkResult], subject: Subject) -> str:
    """Return the results as aligned text: percent, standard error, chance, and the settings."""
    header = ["benchmark", "score", "±", "norm.", "chance", "shots", "documents", "data"]
    lines = [[_name(r), *_numbers(r), str(r.shots), f"{r.documents:,}", r.origin] for r in results]
    scored = [r for r in results if r.score is not None]
    if len(scored) > 1:
        mean = sum(r.metrics[r.score or ""] for r in scored) / len(scored)
        chance = sum(r.chance or 0.0 for r in scored) / len(scored)
        lines.append(["average", _percent(mean), "", "", _percent(chance), "", "", ""])
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rows = [_aligned(line, widths) for line in [header, *lines]]
    rule = "-" * max(map(len, rows))
    if len(scored) > 1:
        rows.insert(-1, rule)
    rows.insert(1, rule)
    return "\n".join([_headline(subject), "", *rows, "", *_footnotes(results), *_kinds_lines(results)])


def _kinds_lines(results: Sequence[BenchmarkResult]) -> list[str]:
    """Return the shares of expert kinds by benchmark; nothing of a model that has but one kind."""
    counted = [result for result in results if len(result.kinds) > 1]
    if not counted:
        return []
    kinds = list(counted[0].kinds)
    header = ["expert kinds, % of choices", *kinds, "tokens"]
    lines = [[r.title, *(_percent(r.mean_kinds[kind]) for kind in kinds), f"{r.tokens:,}"] for r in counted]
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    return ["", *(_aligned(line, widths) for line in [header, *lines]), "mean over MoE layers, of all tokens read"]


def _headline(subject: Subject) -> str:
    step = "" if subject.step is None else f", step {subject.step:,}"
    tokens = "" if subject.tokens is None else f", {subject.tokens:,} training tokens"
    return f"{subject.source}{step}{tokens}"


def _name(result: BenchmarkResult) -> str:
    marks = ("*" if result.notes else "") + ("†" if result.truncated else "")
    return result.title + marks


def _numbers(result: BenchmarkResult) -> list[str]:
    score = result.score
    if score is None:
        name, value = next(iter(result.metrics.items()), ("", math.nan))
        return [f"{name} {value:.4g}", "", "", ""]
    normalised = result.metrics.get("acc_norm") if score != "acc_norm" else None
    return [
        _percent(result.metrics[score]),
        _percent(result.stderr[score]),
        "" if normalised is None else _percent(normalised),
        "" if result.chance is None else _percent(result.chance),
    ]


def _percent(fraction: float) -> str:
    return "–" if math.isnan(fraction) else f"{100 * fraction:.1f}"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *middle, last = (
        cell.ljust(width) if i in (0, len(cells) - 1) else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *middle, last]).rstrip()


def _footnotes(results: Sequence[BenchmarkResult]) -> list[str]:
    lines = [
        "score: accuracy in percent (NQ-open: exact match); norm.: answers compared per character; ±: standard error"
    ]
    lines += [f"* {r.title}: {'; '.join(r.notes)}" for r in results if r.notes]
    lines += [
        f"† {r.title}: the beginning of {100 * r.truncated / r.requests:.0f}% of the prompts did not fit the model"
        for r in results
        if r.truncated
    ]
    return lines


def write_results(path: Path, results: Sequence[BenchmarkResult], subject: Subject, settings: dict[str, Any]) -> None:
    """Write everything as JSON.

    Raises:
        WriteError: the file cannot be written.
    """
    import importlib.metadata

    content = {
        "subject": asdict(subject),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "results": [asdict(result) for result in results],
        "versions": {name: importlib.metadata.version(name) for name in ("lm-eval", "datasets", "torch")},
    }
    files.make_folder(path.parent)
    files.write_whole(path, json.dumps(_without_nan(content), indent=2) + "\n")


def results_file(run_dir: Path, step: int | None) -> Path:
    """``<run directory>/eval/<step>-<UTC time>.json``."""
    name = "none" if step is None else f"{step:08d}"
    time = datetime.now(UTC).strftime("%Y%m%dT%H%M%S-%f")  # to the microsecond: evaluations never replace one another
    return run_dir / "eval" / f"{name}-{time}.json"


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value

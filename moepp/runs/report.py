"""The closing summary of a run: from metrics.jsonl to a picture and a page of text."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from moepp.errors import RunError
from moepp.io.untrusted import printable, read_json, show, terminal_text
from moepp.metrics.jsonl import read_records
from moepp.runs.directory import RunDir

Records = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl."""


_DRAWN_SETS = 8
FEW_TOKENS = 1_000_000  # assumption: a shorter run tries whether everything works, and is no attempt to learn


@dataclass(frozen=True)
class ReportInputs:
    """What the summary shows besides the metrics; kept in ``report.json`` so that it can be drawn again."""

    unigram_entropy: float | None = None  # of the validation tokens under the corpus's token frequencies, nats
    samples: tuple[str, ...] = ()  # continuations by the trained model


def report_files(run_dir: RunDir, inputs: ReportInputs) -> tuple[dict[str, str | bytes], str]:
    """Return what belongs as ``report.json``, ``loss.png`` and ``summary.md`` into the run directory; and the summary.

    Raises:
        RunError: no metrics.
    """
    records = read_records(run_dir.metrics_file)
    if not records:
        raise RunError(f"{run_dir.metrics_file} holds no record yet; train at least train.log_interval steps first")
    text = summary_text(records, inputs, run_dir)
    picture = io.BytesIO()
    draw_loss(records, picture, inputs.unigram_entropy)
    kept = json.dumps(asdict(inputs), indent=2) + "\n"
    return {"report.json": kept, "loss.png": picture.getvalue(), "summary.md": text}, text


def read_inputs(run_dir: RunDir) -> ReportInputs:
    """Return the entropy given to the last report, and training's samples (samples.json).

    Raises:
        RunError: ``report.json`` or ``samples.json`` is damaged.
    """
    stored = _read_json(run_dir.path / "report.json") or {"unigram_entropy": None, "samples": []}
    drawn = _read_json(run_dir.path / "samples.json")
    try:
        samples = [f"{s['prompt']} [...] {s['continuation']}" for s in drawn] if drawn else stored["samples"]
        entropy = stored["unigram_entropy"]
        if not isinstance(samples, list) or not all(isinstance(sample, str) for sample in samples):
            raise TypeError("samples are not texts")
        if type(entropy) not in (int, float, type(None)):
            raise TypeError(f"unigram_entropy={show(entropy)} is no number")
        return ReportInputs(entropy, tuple(terminal_text(sample) for sample in samples))
    except (KeyError, TypeError) as error:
        reason = printable(error, 100)
        raise RunError(f"report.json or samples.json in {run_dir.path} is damaged ({reason}); remove it") from error


def _read_json(path: Path) -> Any:
    return read_json(path, error=RunError, remedy=f"{path.name} is damaged; remove it") if path.exists() else None


def summary_text(records: Records, inputs: ReportInputs, run_dir: RunDir) -> str:
    """Return the summary as Markdown, whatever metrics are missing."""
    sections = [
        _headline(records),
        _loss_section(records, inputs.unigram_entropy),
        _routing_section(records),
        _bytes_section(records),
        _samples_section(inputs.samples),
        _places_section(run_dir),
    ]
    return "\n\n".join(sections) + "\n"


def draw_loss(records: Records, stream: BinaryIO, unigram_entropy: float | None = None) -> None:
    """Draw training and validation losses against tokens into ``stream`` (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's global state alone
    axes = figure.subplots()
    sets = [(f"eval/{name}/loss", f"validation, {name}", "o-") for name, _ in named_sets(records)[:_DRAWN_SETS]]
    for name, label, style in (("train/loss", "training", "-"), ("eval/loss", "validation", "o-"), *sets):
        points = [(record["tokens"], record[name]) for record in records if record.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, linestyle="--", color="grey", label="unigram entropy")
    axes.set_xlabel("tokens")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(stream, format="png", dpi=120)


def _headline(records: Records) -> str:
    last = max(records, key=lambda record: record["step"])
    speed = _last_with(records, "throughput/tokens_per_second")
    text = f"# Training summary\n\n{last['step']:,} optimizer steps, {last['tokens']:,} tokens"
    if speed is not None:
        text += f", {speed['throughput/tokens_per_second']:,.0f} tokens/s at the end"
    return text + "."


def _loss_section(records: Records, unigram_entropy: float | None) -> str:
    lines = ["## Loss", ""]
    train, evaluation = _last_with(records, "train/loss"), _last_with(records, "eval/loss")
    if train is not None:
        lines.append(f"- training loss: {train['train/loss']:.4f} nats per token at step {train['step']:,}")
    lines += [f"- validation loss of {name}: {loss:.4f} nats per token" for name, loss in named_sets(records)]
    if evaluation is None and len(lines) > 2 + (train is not None):
        return "\n".join(lines)
    if evaluation is None:
        lines.append("- validation loss: not measured (train.eval_batches=0, or no evaluation yet)")
        return "\n".join(lines)
    loss = evaluation["eval/loss"]
    lines.append(f"- validation loss: {loss:.4f} nats per token at step {evaluation['step']:,}")
    if unigram_entropy is not None:
        lines.append(f"- unigram entropy of the corpus: {unigram_entropy:.4f} nats per token")
        margin = unigram_entropy - loss
        lines.append(f"- {_verdict(margin, evaluation['tokens'])}")
    return "\n".join(lines)


def named_sets(records: Records) -> list[tuple[str, float]]:
    """Return the last loss of each set of ``data.validation``, by name."""
    names = dict.fromkeys(name for record in records for name in record if re.fullmatch(r"eval/[\w-]{1,64}/loss", name))
    last = {name: record[name] for name in names if (record := _last_with(records, name)) is not None}
    return [(name.split("/")[1], loss) for name, loss in last.items()]


def _verdict(margin: float, tokens: int) -> str:
    """Return a sentence on the validation loss being ``nats`` below (negative: above) the unigram entropy."""
    if margin > 0:
        return (
            f"PASS: the validation loss is {margin:.4f} below the unigram entropy: "
            "the model has learned more than how frequent each token is"
        )
    above = f"the validation loss is {-margin:.4f} above the unigram entropy"
    if tokens < FEW_TOKENS:
        return f"REMARK: {above}, as is usual after only {tokens:,} tokens; train longer before judging the model"
    return f"FAIL: {above}: the model predicts no better than token frequencies alone"


def _routing_section(records: Records) -> str:
    record = _last_with(records, "routing/ffn_per_token")
    if record is None:
        return "## Routing\n\nNo routing metrics: the model has no MoE layer, or nothing was logged."
    matches = (re.fullmatch(r"routing/layer_([0-9]{1,9})/share_ffn", name) for name in record)
    layers = sorted(int(match[1]) for match in matches if match)
    # With logging.routing=brief there is but the mean of all layers.
    places = {str(layer): f"routing/layer_{layer}" for layer in layers} or {"mean of all": "routing"}
    first = f"{next(iter(places.values()))}/share_"
    kinds = [name.removeprefix(first) for name in record if name.startswith(first)]
    header = ["layer", *(f"{printable(kind)} %" for kind in kinds), "FFN load max/mean"]
    rows = []
    for place, prefix in places.items():
        shares = [_number(record.get(f"{prefix}/share_{kind}"), "{:.1f}", 100) for kind in kinds]
        rows.append([place, *shares, _number(record.get(f"{prefix}/max_over_mean"), "{:.2f}")])
    dropped = _number(record.get("routing/drop_fraction"), "{:.2f}%", 100)
    return "\n".join(
        [
            "## Routing",
            "",
            f"Share of the routed tokens per expert kind, at step {record['step']:,} (mean since the log before):",
            "",
            *table_lines(header, rows),
            "",
            f"FFN experts per token: {_number(record['routing/ffn_per_token'], '{:.3f}')}; "
            f"dropped assignments: {dropped}",
        ]
    )


def _bytes_section(records: Records) -> str:
    sent = mean_per_step(records, "comm/dispatch_bytes")
    vanilla = mean_per_step(records, "comm/dispatch_bytes_vanilla")
    title = "## Bytes between ranks\n\n"
    if sent is None or vanilla is None:
        return title + "No communication metrics were logged."
    if vanilla == 0:
        return title + "Nothing was sent: every expert is local (one process, or parallel.expert=1)."
    return title + (
        f"Rows sent per optimizer step, over all ranks and the whole run: {_bytes(sent)}; "
        f"a vanilla MoE with the same tokens and top-k would send {_bytes(vanilla)} "
        f"({100 * (1 - sent / vanilla):.1f}% saved)."
    )


def _samples_section(samples: Sequence[str]) -> str:
    if not samples:
        return "## Samples\n\nNone were drawn."
    parts = ["## Samples"]
    for number, sample in enumerate(samples, start=1):
        quoted = "\n".join(f"> {line}".rstrip() for line in sample.splitlines() or [""])
        parts.append(f"{number}.\n\n{quoted}")
    return "\n\n".join(parts)


def _places_section(run_dir: RunDir) -> str:
    places = {
        "this summary": run_dir.path / "summary.md",
        "loss curve": run_dir.path / "loss.png",
        "metrics": run_dir.metrics_file,
        "configuration": run_dir.config_file,
        "versions and hardware": run_dir.environment_file,
        "checkpoints": run_dir.checkpoints,
        "W&B (upload with `wandb sync`)": run_dir.wandb,
        "log files": run_dir.log,
    }
    return "## Where everything lies\n\n" + "\n".join(f"- {name}: `{path}`" for name, path in places.items())


def _last_with(records: Records, name: str) -> Mapping[str, Any] | None:
    """Return the last record in which ``name`` is a number."""
    return next((record for record in reversed(records) if record.get(name) is not None), None)


def mean_per_step(records: Records, name: str) -> float | None:
    """Return the mean of a per-step metric over the run, weighing each record by the steps since the one before."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return mean_since_before([step for step, _ in points], [value for _, value in points])


def mean_since_before(places: Sequence[float], values: Sequence[float]) -> float | None:
    """Return the mean of values, each of which counts for what lies between the place before and its own."""
    if not places:
        return None
    weights = [after - before for before, after in pairwise(places)]
    # A run that continues another one starts late: its first record covers no more steps than the next one.
    weights.insert(0, min(places[0], weights[0]) if weights else 1)
    total = sum(weights)
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / total if total else None


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table with aligned columns, readable as plain text too."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * (width - 1) + ":" for width in widths], *rows]
    return ["| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]


def _number(value: float | None, pattern: str, scale: float = 1.0) -> str:
    return pattern.format(value * scale) if value is not None else "-"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"

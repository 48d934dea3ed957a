"""The page of a run, and of several beside each other; files that belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from moepp.analysis.charts import charts, frontier, tokens_per_second
from moepp.analysis.comparison import compare, group_seeds, write_table
from moepp.analysis.figures import Figure, compact
from moepp.analysis.page import Page
from moepp.analysis.runs import Run, compared_keys
from moepp.io import files
from moepp.runs.report import ReportInputs

PAGE, FIGURES, TABLE = "report.html", "figures", "comparison.csv"


def write_run_page(run: Run, inputs: ReportInputs, folder: Path) -> Path:
    """Write ``report.html`` and ``figures/*.png`` of one run; the page's path.

    Raises:
        WriteError: the folder cannot be written.
    """
    page = Page(run.name, f"{run.steps:,} optimizer steps. Every number comes from metrics.jsonl in {run.path}.")
    page.cards(_cards(run))
    drawn = charts([run])
    page.section("What happened")
    page.figures(drawn)
    if inputs.samples:
        page.section("Samples", "Continuations by the trained model.")
        for number, sample in enumerate(inputs.samples, start=1):
            page.details(f"Sample {number}", sample)
    page.section("Checkpoints and configuration")
    if run.checkpoints:
        rows = [(name, f"{size / 1e6:,.1f}") for name, size in run.checkpoints]
        page.plain_table(("checkpoint", "MB"), rows, "Checkpoints of this run")
    page.details("config.yaml", yaml.safe_dump(dict(run.tree), sort_keys=True))
    return _write(page, drawn, folder)


def write_comparison(runs: Sequence[Run], folder: Path, sort: str = "eval_loss") -> Path:
    """Write ``report.html``, ``figures/*.png`` and ``comparison.csv`` of several runs; the page's path.

    Raises:
        ConfigError: ``sort`` is no column.
        WriteError: the folder cannot be written.
    """
    rows, seeds = compare(runs, sort), group_seeds(runs)
    keys = compared_keys(runs)
    differ = (
        f"They differ in {', '.join(keys)}." if keys else "Their configurations differ in nothing but seeds and names."
    )
    page = Page(f"{len(runs)} runs", f"{differ} Every number comes from the runs' metrics.jsonl.")
    page.table(rows, "One row per run, the best first")
    if seeds:
        page.section("By seed", "Runs that differ in their seed alone: mean and sample standard deviation.")
        page.table(seeds, "One row per setting")
    drawn = [figure for figure in (frontier(runs), *charts(runs)) if figure is not None]
    page.section("Curves")
    page.figures(drawn)
    page.section("Each run")
    page.plain_table(("run", "directory"), [(run.name, str(run.path)) for run in runs], "Where the runs lie", False)
    files.make_folder(folder)
    write_table(folder / TABLE, rows)
    return _write(page, drawn, folder)


def _cards(run: Run) -> list[tuple[str, str]]:
    cards = [("tokens", f"{run.tokens:,}")]
    for what, metric, pattern in (
        ("validation loss, nats per token", "eval/loss", "{:.4f}"),
        ("training loss, nats per token", "train/loss", "{:.4f}"),
        ("FFN experts per token", "routing/ffn_per_token", "{:.3f}"),
        ("dropped assignments", "routing/drop_fraction", "{:.2%}"),
        ("model FLOPs utilisation", "throughput/mfu", "{:.1%}"),
    ):
        if (last := run.series(metric).last) is not None:
            cards.append((what, pattern.format(last)))
    if (speed := tokens_per_second(run)) is not None:
        cards.append(("tokens per second, median", f"{speed:,.0f}"))
    if run.flops:
        cards.append(("operations, forward and backward", compact(run.flops.values[-1])))
    if run.bytes_sent is not None and run.bytes_sent[1]:
        sent, vanilla = run.bytes_sent
        cards.append(("expert-parallel traffic saved", f"{1 - sent / vanilla:.1%}"))
    return cards


def _write(page: Page, drawn: Sequence[Figure], folder: Path) -> Path:
    files.make_folder(folder / FIGURES)
    for figure in drawn:
        files.write_whole(folder / FIGURES / f"{figure.name}.png", figure.png)
    files.write_whole(folder / PAGE, page.render())
    return folder / PAGE

"""The page of a run, and of several beside each other; files that belong to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moepp.analysis.charts import curve_charts, tokens_per_second
from moepp.analysis.comparison import (
    compare,
    default_sort,
    group_seeds,
    order_text,
    uneven_seeds,
    with_paths,
)
from moepp.analysis.cost_charts import cost_charts
from moepp.analysis.curves import same_seeds
from moepp.analysis.differences import differences, frontier
from moepp.analysis.figures import Figure, compact, shorten
from moepp.analysis.losses import VALIDATION, compared_loss, validation_sets
from moepp.analysis.page import Page
from moepp.analysis.page_folder import write_page
from moepp.analysis.routing_charts import routing_charts
from moepp.analysis.runs import Run, compared_keys
from moepp.analysis.task_kinds import task_kinds
from moepp.analysis.token_pages import missing_tables, read_tables, task_figures, text_markup, token_figures
from moepp.analysis.validation_charts import validation_charts
from moepp.errors import RunError
from moepp.runs.report import ReportInputs

_CARD_SETS = 4
TABLE, SEEDS, DIFFERENCES = "comparison.csv", "seeds.csv", "differences.csv"


def write_run_page(
    run: Run, inputs: ReportInputs, folder: Path, beside: Mapping[str, str | bytes] | None = None
) -> Path:
    """Write ``report.html`` and ``figures/*.png`` of one run, and ``beside`` it other files by name; the page's path.

    What an earlier page had there, and this one has not, is removed.

    Raises:
        RunError: a file lies there that is of no page.
        WriteError: the folder cannot be written.
    """
    page = Page(run.name, f"{run.steps:,} optimizer steps. Numbers come from metrics.jsonl in {run.path}.")
    tokens, text, problem = _tokens(run)
    page.notes([*run.notes, *problem])
    page.cards(_cards(run))
    drawn: list[Figure] = []
    for heading, figures in (
        ("Learning", [*curve_charts([run], inputs.unigram_entropy), *validation_charts([run])]),
        ("Routing", routing_charts(run)),
        ("Tokens", tokens),
        ("Cost", cost_charts([run])),
    ):
        if figures:
            page.section(heading)
            page.figures(figures)
            drawn += figures
    page.markup(text)
    if inputs.samples:
        page.section("Samples", "Continuations by the trained model.")
        for number, sample in enumerate(inputs.samples, start=1):
            page.details(f"Sample {number}", sample)
    page.section("Checkpoints and configuration")
    if run.checkpoints:
        rows = [(name, f"{size / 1e6:,.1f}") for name, size in run.checkpoints]
        page.plain_table(("checkpoint", "MB"), rows, "Checkpoints of this run")
    else:
        page.markup("<p>There is no checkpoint.</p>")
    page.details("config.yaml", yaml.safe_dump(dict(run.tree), sort_keys=True))
    return write_page(page, drawn, folder, beside=beside)


def _tokens(run: Run) -> tuple[list[Figure], str, list[str]]:
    """Return figures and a text sample of the run's tables of tokens and tasks, and what is wrong with them."""
    tasks, source, problems = task_kinds(run)
    try:
        found = read_tables(run.path)
    except RunError as error:
        return task_figures(tasks, source), "", [*problems, f"The tables of tokens are left out: {error}"]
    tables, place = found.tables, found.place
    problems += [*missing_tables(tables, place), *([found.remark] if found.remark else [])]
    figures = token_figures(tables, place) if tables else []
    return [*figures, *task_figures(tasks, source)], text_markup(tables["text"]) if tables else "", problems


def write_comparison(runs: Sequence[Run], folder: Path, sort: str | None = None, left_out: Sequence[str] = ()) -> Path:
    """Write ``report.html``, ``figures/*.png`` and tables as CSV of several runs; the page's path.

    What an earlier page had there, and this one has not, is removed.

    Args:
        runs: at least one.
        folder: where to write.
        sort: column by which the table is ordered; None: the loss that compares the runs.
        left_out: why some runs of a folder are not among them.

    Raises:
        ConfigError: ``sort`` is no column.
        WriteError: the folder cannot be written.
    """
    rows, seeds, against = compare(runs, sort), group_seeds(runs), differences(runs)
    keys = compared_keys(runs)
    differ = (
        f"They differ in {', '.join(keys)}." if keys else "Their configurations differ in nothing but seeds and names."
    )
    title = f"{len(runs)} runs" if len(runs) > 1 else f"One run: {runs[0].name}"
    if len(runs) == 1:
        differ = "There is no other run to compare it with."
    page = Page(title, f"{differ} Numbers come from the runs' metrics.jsonl.")
    page.notes([*comparison_notes(runs, left_out), *uneven_seeds(seeds)])
    page.table(rows, f"One row per run, {order_text(default_sort(runs) if sort is None else sort)}")
    tables = {TABLE: with_paths(rows, runs)}
    if seeds:
        page.section("By setting", "Runs that differ in their seed alone: mean and sample standard deviation (±).")
        page.table(seeds, "One row per setting")
        tables[SEEDS] = seeds
    if against:
        page.section("Against the vanilla twin", _against_note(against, compared_loss(runs)))
        page.table(against, "One row per setting")
        tables[DIFFERENCES] = against
    curves = [figure for figure in (frontier(runs), *curve_charts(runs), *validation_charts(runs)) if figure]
    costs = cost_charts(runs)
    for heading, figures in (("Learning", curves), ("Cost", costs)):
        if figures:
            page.section(heading)
            page.figures(figures)
    page.section("Each run")
    page.plain_table(("run", "directory"), [(run.name, str(run.path)) for run in runs], "Where the runs lie", False)
    return write_page(page, [*curves, *costs], folder, tables)


def _against_note(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Say what the rows of :func:`differences` are, and which of them compare more than an architecture."""
    note = (
        "Losses minus those of the setting without zero-computation experts that differs in the fewest other keys, at "
        "the furthest point that both reach (below 0: better than it), ± their standard error over seeds (-: one seed, "
        "whose spread is not known; a difference below two of them is none); costs as multiples of its costs per "
        f"token, up to the furthest tokens that both reach. Losses are {metric}; - where two have no tokens or "
        "operations in common."
    )
    mixed = [
        f"{row['setting']} and {row['against']} ({row['also_differs_in']})" for row in rows if row["also_differs_in"]
    ]
    return f"{note} No twins, for they differ in more: {'; '.join(mixed)}." if mixed else note


def comparison_notes(runs: Sequence[Run], left_out: Sequence[str] = ()) -> list[str]:
    """Return what a reader of a comparison must know first: of many runs that are not at their end, one line."""
    unfinished = [(run, total) for run in runs if (total := run.total_steps) is not None and run.steps < total]
    notes = list(left_out)
    if unfinished:
        steps = ", ".join(f"{run.name} (step {run.steps:,} of {total:,})" for run, total in unfinished)
        notes.append(f"Not at their end: {steps}.")
    furthest = max(run.tokens for run in runs)
    if behind := [run.name for run in runs if 2 * run.tokens < furthest]:
        notes.append(f"Drawn but not compared in captions, being not half as far as the longest: {', '.join(behind)}.")
    notes += [f"Of one seed, so that their spread is none of seeds: {', '.join(names)}." for names in same_seeds(runs)]
    return notes + [f"{run.name}: {note}" for run in runs for note in run.faults]


def _cards(run: Run) -> list[tuple[str, str, str]]:
    cards = [("tokens", f"{run.tokens:,}", "tokens, last")]
    # Sets have a drawing of their own; without another loss on held-out data the first of them stand here.
    sets = {} if run.series(VALIDATION) else validation_sets([run])
    for what, metric, pattern in (
        ("validation loss, nats per token", "eval/loss", "{:.4f}"),
        *((f"loss on {shorten(name)}, nats per token", key, "{:.4f}") for name, key in list(sets.items())[:_CARD_SETS]),
        ("validation perplexity", "eval/perplexity", "{:.2f}"),
        ("training loss, nats per token", "train/loss", "{:.4f}"),
        ("FFN experts per token", "routing/ffn_per_token", "{:.3f}"),
        ("dropped assignments", "routing/drop_fraction", "{:.2%}"),
        ("model FLOPs utilisation", "throughput/mfu", "{:.1%}"),
        ("passes over the data", "data/epoch", "{:.3g}"),
    ):
        if (last := run.series(metric).last) is not None:
            cards.append((what, pattern.format(last), f"{metric}, last"))
    if (speed := tokens_per_second(run)) is not None:
        cards.append(("tokens per second", f"{speed:,.0f}", "throughput/tokens_per_second, median"))
    if peak := run.series("memory/peak_allocated_bytes").values:
        cards.append(("peak memory", f"{compact(max(peak))}B", "memory/peak_allocated_bytes, largest"))
    if peak := run.series("memory/host_peak_bytes").values:
        cards.append(("peak memory of the host", f"{compact(max(peak))}B", "memory/host_peak_bytes, largest"))
    if run.flops:
        cards.append(
            ("operations, forward and backward", compact(run.flops.values[-1]), "routing/ffn_per_token and config.yaml")
        )
    if run.bytes_sent is not None and run.bytes_sent[1]:
        sent, vanilla = run.bytes_sent
        source = "1 - comm/dispatch_bytes over comm/dispatch_bytes_vanilla, means over steps"
        cards.append(("expert-parallel traffic saved", f"{1 - sent / vanilla:.1%}", source))
    return cards

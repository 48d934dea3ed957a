"""Pages and parquet tables of what :mod:`moepp.analysis.observe` saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moepp.analysis.figures import Figure, Palette, format_counts, label_of, legend
from moepp.analysis.page import Page
from moepp.analysis.page_folder import write_page
from moepp.analysis.token_tables import Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass
class Findings:
    """Tables by name, the figures drawn of them, and what else a page shows.

    Attributes:
        title, lead: heading and first sentence.
        tables: written as ``<name>.parquet``.
        figures: in order.
        markup: safe markup below the figures.
    """

    title: str
    lead: str
    tables: dict[str, Rows] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    markup: str = ""


def write_findings(findings: Findings, folder: Path, question: str = "tokens") -> Path:
    """Write ``report.html``, ``<table>.parquet`` and ``figures/*.png``; return the page's path.

    What an earlier page of the question had there, and this one has not, is removed.

    Raises:
        WriteError: the folder cannot be written.
    """
    page = Page(findings.title, findings.lead, f"moepp analyze {question}")
    page.section("What was seen")
    page.figures(findings.figures)
    if findings.markup:
        page.markup(findings.markup)
    tables = {f"{name}.parquet": rows for name, rows in findings.tables.items()}
    return write_page(page, findings.figures, folder, tables)


def line_figure(
    name: str,
    title: str,
    caption: str,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    labels: tuple[str, str],
    source: str = "",
) -> Figure:
    """Draw lines by name; ``labels`` of x and y with their units."""

    def draw(axes: Axes, palette: Palette) -> None:
        for number, (label, (x, y)) in enumerate(lines.items()):
            axes.plot(x, y, marker="o", markersize=3.5, linewidth=1.5, label=label_of(label), **palette.line(number))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        format_counts(axes.xaxis, whole=all(value == int(value) for x, _ in lines.values() for value in x))
        legend(axes)

    rows = [(label, f"{x:.4g}", f"{y:.4g}") for label, line in lines.items() for x, y in zip(*line, strict=True)]
    return Figure(name, title, caption, draw, ("line", *labels), rows, source)


def bar_figure(
    name: str,
    title: str,
    caption: str,
    bars: Sequence[tuple[str, float]],
    label: str,
    source: str,
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
) -> Figure:
    """Draw horizontal bars by name; ``label`` of the values with their unit, ``table``: header and rows below."""

    def draw(axes: Axes, palette: Palette) -> None:
        axes.barh(range(len(bars)), [value for _, value in bars], 0.75, color=palette.series(0))
        axes.set_yticks(range(len(bars)), [text for text, _ in bars])
        axes.tick_params(axis="y", labelsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(label)

    return Figure(name, title, caption, draw, *table, source)

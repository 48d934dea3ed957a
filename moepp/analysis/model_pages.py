"""Pages and parquet tables of what :mod:`moepp.analysis.observe` saw."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moepp.analysis.figures import Figure, Palette, draw_figure, format_counts, legend
from moepp.analysis.observe import Observed
from moepp.analysis.page import Page
from moepp.analysis.token_tables import Decode, Rows
from moepp.io import files
from moepp.io.untrusted import terminal_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN_TYPES = 12
_SAMPLE_TOKENS = 240


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


def write_findings(findings: Findings, folder: Path) -> Path:
    """Write ``report.html``, ``<table>.parquet`` and ``figures/*.png``; return the page's path.

    Raises:
        WriteError: the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    page = Page(findings.title, findings.lead)
    page.section("What was seen")
    page.figures(findings.figures)
    if findings.markup:
        page.markup(findings.markup)
    files.make_folder(folder / "figures")
    for name, rows in findings.tables.items():
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        files.write_whole(folder / f"{name}.parquet", buffer.getvalue())
    for figure in findings.figures:
        files.write_whole(folder / "figures" / f"{figure.name}.png", figure.png)
    files.write_whole(folder / "report.html", page.render())
    return folder / "report.html"


def columns_of(rows: Rows, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return these columns as text."""
    return [tuple(f"{v:.4g}" if isinstance(v := row[name], float) else str(v) for name in names) for row in rows]


def line_figure(
    name: str,
    title: str,
    caption: str,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    labels: tuple[str, str],
) -> Figure:
    """Draw lines by name; ``labels`` of x and y with their units."""

    def draw(axes: Axes, palette: Palette) -> None:
        for number, (label, (x, y)) in enumerate(lines.items()):
            axes.plot(x, y, marker="o", markersize=3.5, linewidth=1.5, label=label, **palette.line(number))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        format_counts(axes.xaxis, whole=all(value == int(value) for x, _ in lines.values() for value in x))
        legend(axes)

    rows = [(label, f"{x:.4g}", f"{y:.4g}") for label, line in lines.items() for x, y in zip(*line, strict=True)]
    return draw_figure(name, title, caption, draw, ("line", *labels), rows)


def bar_figure(name: str, title: str, caption: str, bars: Sequence[tuple[str, float]], label: str) -> Figure:
    """Draw horizontal bars by name; ``label`` of the values with their unit."""

    def draw(axes: Axes, palette: Palette) -> None:
        axes.barh(range(len(bars)), [value for _, value in bars], 0.75, color=palette.series(0))
        axes.set_yticks(range(len(bars)), [text for text, _ in bars])
        axes.tick_params(axis="y", labelsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(label)

    rows = [(text, f"{value:.4g}") for text, value in bars]
    return draw_figure(name, title, caption, draw, ("what", label), rows)


def type_figure(rows: Rows) -> Figure | None:
    """Draw the token types with the most and the fewest FFN experts (Fig. 5 of the paper)."""
    if len(rows) < 2:
        return None
    shown = rows if len(rows) <= 2 * _SHOWN_TYPES else [*rows[:_SHOWN_TYPES], *rows[-_SHOWN_TYPES:]]
    bars = [(plain_label(row["text"]), row["ffn_per_token"]) for row in shown]
    most, least = rows[0], rows[-1]
    caption = (
        f"{plain_label(most['text'])} uses {most['ffn_per_token']:.2f} FFN experts on average, "
        f"{plain_label(least['text'])} {least['ffn_per_token']:.2f}: the router tells them apart by "
        f"{most['ffn_per_token'] - least['ffn_per_token']:.2f}. The most and the fewest of {len(rows)} types are shown."
    )
    return bar_figure(
        "token-types", "Which tokens use FFN experts", caption, bars, "FFN experts per token, mean over layers"
    )


def plain_label(text: str) -> str:
    """Return a token as a label: blanks are seen, and nothing in it is mathematics to matplotlib."""
    shown = terminal_text(text).replace(" ", "\N{OPEN BOX}").replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
    return shown.replace("$", r"\$")[:24]


def rank_figure(name: str, title: str, rows: Rows, what: str) -> Figure:
    """Draw FFN experts per token over tenths of the tokens."""
    x, y = [row["tenth"] for row in rows], [row["ffn_per_token"] for row in rows]
    trend = "more" if y[-1] > y[0] else "fewer"
    caption = f"From the first to the last tenth: {y[0]:.3f} to {y[-1]:.3f}; {what} get {trend} FFN experts."
    return line_figure(name, title, caption, {"FFN experts": (x, y)}, ("tenth of the tokens", "FFN experts per token"))


def text_sample(seen: Observed, decode: Decode) -> str:
    """Return the beginning of the first sequence, each token shaded by its number of FFN experts."""
    ids, ffn = seen.input_ids_NS[0][:_SAMPLE_TOKENS], seen.ffn_NS[0][:_SAMPLE_TOKENS]
    low, high = float(ffn.min()), float(ffn.max())
    spans = []
    for token, value in zip(ids.tolist(), ffn.tolist(), strict=True):
        percent = round(100 * (value - low) / (high - low)) if high > low else 0
        colour = f"color-mix(in srgb, var(--series-2) {percent}%, transparent)"
        text = html.escape(terminal_text(decode([token])), quote=True)
        spans.append(f'<span style="border-color:{colour}" title="{value:.2f} FFN experts">{text}</span>')
    note = f"The line under a token is the stronger the more FFN experts it uses, from {low:.2f} to {high:.2f}."
    return f'<h2>Text</h2><p>{note}</p><p class="text-sample">{"".join(spans)}</p>'


def gate_figures(rows: Rows) -> list[Figure]:
    """Draw the first and second choice's mean gate weight by layer (Fig. 6 of the paper)."""
    lines = {}
    for residuals in dict.fromkeys(row["residuals"] for row in rows):
        for choice in (1, 2):
            part = [row for row in rows if row["residuals"] == residuals and row["choice"] == choice]
            if part:
                lines[f"choice {choice}, {residuals}"] = ([r["layer"] for r in part], [r["mean"] for r in part])
    shifts = [
        abs(a - b)
        for a, b in zip(lines["choice 1, with"][1], lines.get("choice 1, without", ([], []))[1], strict=False)
    ]
    effect = (
        f"Cutting the gating residuals moves the first choice's mean weight by up to {max(shifts):.3f}. "
        if shifts
        else ""
    )
    second = lines.get("choice 2, with", ([], [0.0]))[1]
    caption = f"{effect}The second choice weighs {min(second):.3f} to {max(second):.3f} of 1, by layer."
    return [line_figure("gate-weights", "Gate weights", caption, lines, ("MoE layer", "mean gate weight"))]


def source_figure(rows: Rows) -> Figure:
    """Draw the shares of expert kinds by data source, mean over layers (Fig. 8 of the paper)."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    kinds = [name for name in rows[0] if name not in ("source", "layer")]
    shares = {kind: [_mean([r[kind] for r in rows if r["source"] == source]) for source in sources] for kind in kinds}

    def draw(axes: Axes, palette: Palette) -> None:
        left = [0.0] * len(sources)
        for number, (kind, values) in enumerate(shares.items()):
            axes.barh(range(len(sources)), values, 0.6, left=left, color=palette.series(number), label=kind)
            left = [sum(pair) for pair in zip(left, values, strict=True)]
        axes.set_yticks(range(len(sources)), [plain_label(source) for source in sources])
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the router's choices, mean over layers")
        legend(axes)

    ends = ", ".join(f"{source} {shares['ffn'][n]:.1%}" for n, source in enumerate(sources))
    caption = f"Share of FFN experts: {ends}. Sources that differ are told apart by the router."
    table = [(source, *(f"{shares[kind][n]:.3f}" for kind in kinds)) for n, source in enumerate(sources)]
    return draw_figure("sources", "Expert kinds by data source", caption, draw, ("source", *kinds), table)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def pick(rows: Rows, key: str, value: object, y: str, x: str = "first") -> tuple[list[float], list[float]]:
    """Return (x, y) columns of the rows in which ``key`` has this value."""
    part = [row for row in rows if row[key] == value]
    return [row[x] for row in part], [row[y] for row in part]


def communication_figures(rows: Rows) -> list[Figure]:
    """Draw bytes per token by expert-parallel size, of every model and of a vanilla MoE."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    lines = {name: pick(rows, "model", name, "bytes_per_token", "ranks") for name in names}
    lines["everything sharded"] = pick(rows, "model", names[0], "everything_sharded", "ranks")
    saved = ", ".join(
        f"{row['model']} (tau {row['tau']}) {row['saved']:.0%}" for row in rows if row["ranks"] == rows[-1]["ranks"]
    )
    caption = (
        "Saved against a vanilla MoE of the same top-k, which sends as much as one that shards the other experts "
        f"too: {saved}. The share is the same for every number of ranks: it is that of FFN choices."
    )
    title = "Expert-parallel traffic by number of ranks"
    return [line_figure("communication", title, caption, lines, ("expert-parallel ranks", "bytes per token and step"))]


def long_context_figures(rows: Rows) -> list[Figure]:
    """Draw agreement, entropy and loss by position."""
    figures = []
    for column, title, unit in (
        ("agreement", "Routing far beyond the trained length", "share of experts as in a window"),
        ("entropy", "Router entropy by position", "entropy of the router, nats"),
        ("loss", "Loss by position", "cross-entropy, nats per token"),
    ):
        names = list(dict.fromkeys(row["residuals"] for row in rows))
        lines = {f"{name} residuals": pick(rows, "residuals", name, column) for name in names}
        ends = ", ".join(f"{name} {y[0]:.3f} at the start and {y[-1]:.3f} at the end" for name, (_, y) in lines.items())
        caption = f"{ends}. A level line means that routing does not depend on how far the token is from the start."
        figures.append(line_figure(f"long-{column}", title, caption, lines, ("position in the sequence", unit)))
    return figures


def robustness_figures(rows: Rows) -> list[Figure]:
    """Draw the loss that swapped routing costs, by how hard the token is."""
    names = {0: "all tokens", 1: "easiest quarter", 2: "second", 3: "third", 4: "hardest quarter"}
    lines = {label: pick(rows, "quarter", quarter, "increase", "share") for quarter, label in names.items()}
    worst = max((y[-1], label) for label, (_, y) in lines.items())
    caption = (
        f"With every choice swapped the loss rises by {lines['all tokens'][1][-1]:.3f} nats; most for the {worst[1]} "
        f"({worst[0]:.3f}). Level lines would mean that it does not matter which family computes a token."
    )
    labels = ("share of tokens with swapped routing", "increase of the loss, nats")
    return [line_figure("robustness", "Loss when routing is swapped", caption, lines, labels)]

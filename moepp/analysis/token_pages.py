"""Figures of the token tables: FFN experts per token by type, position, frequency, loss and source."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moepp.analysis.figures import Figure, Palette, bar_labels, label_of, legend
from moepp.analysis.model_pages import bar_figure, line_figure
from moepp.analysis.token_tables import FOLDER, LEAST_READ, Rows, explained_by_type
from moepp.errors import RunError
from moepp.io.tables import read_parquet
from moepp.io.untrusted import terminal_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN_TYPES = 12
_MAX_BYTES = 256 << 20  # of a table
_SURE = 2.0  # standard errors that a difference must exceed to be called one


_COLUMNS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "types": {"text": str, "count": int, "ffn_per_token": float, "ffn_std": float, "loss": float, "examples": list},
    "positions": {"first": int, "ffn_per_token": float, "ffn_error": float},
    "frequencies": {"tenth": int, "ffn_per_token": float, "ffn_error": float},
    "losses": {"tenth": int, "ffn_per_token": float, "ffn_error": float},
    "kinds": {"source": str, "layer": int, "ffn": float},
    "text": {"text": str, "ffn_per_token": float},
}


@dataclass(frozen=True)
class TokenTables:
    """Tables of a run.

    Attributes:
        tables: rows by name; {} where there are none.
        place: their folder in the run.
        remark: why others are not shown; "" where there are no others.
    """

    tables: dict[str, Rows]
    place: str = ""
    remark: str = ""


def read_tables(run_path: Path) -> TokenTables:
    """Return the newer of what training left and what moepp analyze wrote.

    Raises:
        RunError: a table is damaged, or of another version.
    """
    written = {folder: _written(run_path / folder) for folder in (FOLDER, f"analysis/{FOLDER}")}
    known = {folder: when for folder, when in written.items() if when is not None}
    if not known:
        return TokenTables({})
    folder = max(known, key=known.__getitem__)
    paths = {name: run_path / folder / f"{name}.parquet" for name in _COLUMNS}
    tables = {name: _read_table(path, _COLUMNS[name]) if path.exists() else [] for name, path in paths.items()}
    remark = "".join(
        f"Tables of tokens are those of {folder}/, of {_date(known[folder])}; those of {other}/ are older."
        for other in known
        if other != folder
    )
    return TokenTables(tables, f"{folder}/", remark)


def _written(folder: Path) -> float | None:
    """Return when the newest of the tables in a folder was written, seconds since the epoch; None without any."""
    times = []
    for name in _COLUMNS:
        with suppress(FileNotFoundError):
            times.append((folder / f"{name}.parquet").stat().st_mtime)
    return max(times, default=None)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _read_table(path: Path, columns: Mapping[str, type | tuple[type, ...]]) -> Rows:
    rows = read_parquet(path, _MAX_BYTES, RunError, "remove it, or write it again")
    for row in rows:
        for name, kinds in columns.items():
            if not isinstance(row.get(name), kinds):
                raise RunError(f"{path} has no {name} in a row; remove it, or write it again")
    return rows


def missing_tables(tables: Mapping[str, Rows], place: str) -> list[str]:
    """Say which tables are not there that every run with tables has: types and text may be empty."""
    always = ("positions", "frequencies", "losses", "kinds")
    missing = [f"{place}{name}.parquet" for name in always if tables and not tables[name]]
    return [f"Missing, and not drawn: {', '.join(missing)}."] if missing else []


def token_figures(tables: Mapping[str, Rows], place: str = "") -> list[Figure]:
    """Return the figures of the tables; ``place`` is the folder where they lie, to be named as their source."""

    def source(name: str) -> str:
        return f"{place}{name}.parquet"

    figures = [
        _type_figure(tables["types"], source("types")),
        _trend_figure("positions", "By position", tables["positions"], source("positions")),
        _trend_figure("frequencies", "By frequency, rare to frequent", tables["frequencies"], source("frequencies")),
        _trend_figure("losses", "By loss of the next token, easy to hard", tables["losses"], source("losses")),
        _source_figure(tables["kinds"], source("kinds")),
    ]
    return [figure for figure in figures if figure is not None]


def _type_figure(rows: Rows, source: str) -> Figure | None:
    """Draw the token types with the most and the fewest FFN experts (Fig. 5 of the paper)."""
    if len(rows) < 2:
        return None
    shown = rows if len(rows) <= 2 * _SHOWN_TYPES else [*rows[:_SHOWN_TYPES], *rows[-_SHOWN_TYPES:]]
    bars = [(f"{plain_label(row['text'])} ({row['count']})", row["ffn_per_token"]) for row in shown]
    most, least = rows[0], rows[-1]
    share = explained_by_type(rows)
    if share is None:
        caption = f"All {len(rows)} token types use {most['ffn_per_token']:.2f} FFN experts."
    else:
        caption = (
            f"The most and the fewest of {len(rows)} token types, with how often each was read: "
            f"{plain_label(most['text'])} uses {most['ffn_per_token']:.2f}, {plain_label(least['text'])} "
            f"{least['ffn_per_token']:.2f}. A token's type explains {max(share, 0):.0%} of the variance between "
            "tokens, chance deducted."
        )
    caption += f" Types that were read less than {LEAST_READ} times are left out."
    label = "FFN experts per token, mean over layers"
    header = ("token", "read", "FFN experts", "± over its tokens", "loss of the next", "in context")
    table = [
        (
            *(plain_label(row["text"]), str(row["count"]), f"{row['ffn_per_token']:.3f}", f"{row['ffn_std']:.3f}"),
            *(f"{row['loss']:.3f}", "  |  ".join(" ".join(str(text).split()) for text in row["examples"])),
        )
        for row in shown
    ]
    return bar_figure("token-types", "Which tokens use FFN experts", caption, bars, label, source, (header, table))


def plain_label(text: str) -> str:
    """Return a token as a label: blanks and ends of lines are seen."""
    shown = terminal_text(text).replace(" ", "\N{OPEN BOX}").replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
    return shown[:24]


def _trend_figure(name: str, title: str, rows: Rows, source: str) -> Figure | None:
    if len(rows) < 2:
        return None
    has_tenths = "tenth" in rows[0]
    x, y = [row["tenth" if has_tenths else "first"] for row in rows], [row["ffn_per_token"] for row in rows]
    difference = y[-1] - y[0]
    error = math.hypot(rows[0]["ffn_error"], rows[-1]["ffn_error"])
    ends = "the first to the last tenth" if has_tenths else "the start to the end of a sequence"
    verdict = "no difference beyond chance" if abs(difference) <= _SURE * error else f"{difference:+.3f}"
    caption = (
        f"From {ends}: {y[0]:.3f} to {y[-1]:.3f} FFN experts per token ({verdict}; standard error {error:.3f}, as if "
        f"tokens were independent). Lowest {min(y):.3f}, highest {max(y):.3f}."
    )
    labels = ("tenth of the tokens" if has_tenths else "position in the sequence", "FFN experts per token")
    return line_figure(name, title, caption, {"FFN experts": (x, y)}, labels, source)


def _source_figure(
    rows: Rows, source: str, names: tuple[str, str] = ("sources", "Expert kinds by data source")
) -> Figure | None:
    """Draw the shares of expert kinds by data source or task, mean over layers (Fig. 8 of the paper).

    ``names``: of the file, and the heading.
    """
    if not rows:
        return None
    sources = list(dict.fromkeys(row["source"] for row in rows))
    kinds = [name for name in rows[0] if name not in ("source", "layer", "tokens")]
    shares = {
        kind: [_mean([r.get(kind, 0.0) for r in rows if r["source"] == name]) for name in sources] for kind in kinds
    }

    def draw(axes: Axes, palette: Palette) -> None:
        left = [0.0] * len(sources)
        for number, (kind, values) in enumerate(shares.items()):
            axes.barh(range(len(sources)), values, 0.6, left=left, color=palette.series(number), label=label_of(kind))
            left = [sum(pair) for pair in zip(left, values, strict=True)]
        bar_labels(axes, [plain_label(name) for name in sources])
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the router's choices, mean over layers")
        legend(axes)

    ffn = dict(zip(sources, shares["ffn"], strict=True))
    most, least = max(ffn, key=ffn.__getitem__), min(ffn, key=ffn.__getitem__)
    caption = f"Share of FFN experts: {ffn[most]:.1%} ({plain_label(most)})"
    caption += f" to {ffn[least]:.1%} ({plain_label(least)})." if len(sources) > 1 else "; nothing else was read."
    table = [(name, *(f"{shares[kind][n]:.3f}" for kind in kinds)) for n, name in enumerate(sources)]
    return Figure(*names, caption, draw, (names[0].removesuffix("s"), *kinds), table, source)


def task_figures(rows: Rows, source: str) -> list[Figure]:
    """Return the shares of expert kinds by evaluation task (Fig. 8 of the paper); none without tasks."""
    figure = _source_figure(rows, source, ("tasks", "Expert kinds by evaluation task"))
    return [] if figure is None else [figure]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def gate_figures(rows: Rows) -> list[Figure]:
    """Draw the first and second choice's mean gate weight by layer (Fig. 6 of the paper)."""
    named = {"with": ", with residuals", "without": ", residuals cut", "none": ""}
    lines = {}
    for residuals in dict.fromkeys(row["residuals"] for row in rows):
        for choice in (1, 2):
            part = [row for row in rows if row["residuals"] == residuals and row["choice"] == choice]
            if part:
                lines[f"choice {choice}{named[residuals]}"] = ([r["layer"] for r in part], [r["mean"] for r in part])
    own = named[rows[0]["residuals"]]
    cut = lines.get(f"choice 1{named['without']}")
    caption = "" if own else "The model has no gating residuals. "
    if cut is not None:
        shift = max(abs(a - b) for a, b in zip(lines[f"choice 1{own}"][1], cut[1], strict=True))
        caption = f"Cutting the gating residuals moves the first choice's mean weight by up to {shift:.3f}. "
    if second := lines.get(f"choice 2{own}"):
        caption += f"The second choice weighs {min(second[1]):.3f} to {max(second[1]):.3f} of 1, by layer."
    else:
        caption += "Each token chooses one expert."
    labels = ("layer", "mean gate weight")
    return [line_figure("gate-weights", "Gate weights", caption, lines, labels, "gates.parquet")]


def text_markup(rows: Rows) -> str:
    """Return the text, each token underlined by its number of FFN experts; safe markup, "" without text."""
    if not rows:
        return ""
    values = [row["ffn_per_token"] for row in rows]
    low, high = min(values), max(values)
    spans = []
    for row, value in zip(rows, values, strict=True):
        percent = round(100 * (value - low) / (high - low)) if high > low else 0
        colour = f"color-mix(in srgb, var(--series-2) {percent}%, transparent)"
        text = html.escape(terminal_text(str(row["text"])), quote=True)
        shade = f"border-color:{colour};background:color-mix(in srgb, var(--series-2) {percent // 6}%, transparent)"
        spans.append(f'<span style="{shade}" title="{value:.2f} FFN experts">{text}</span>')
    start = f"The first {len(rows)} tokens of the first sequence. "
    note = f"{start}The more FFN experts a token uses, the stronger its shade and line: from {low:.2f} to {high:.2f}."
    if high <= low:
        note = f"{start}Every token uses {low:.2f} FFN experts, so none is shaded."
    return f'<h2>Text</h2><p>{note}</p><p class="text-sample">{"".join(spans)}</p>'

"""One HTML file with everything in it: no script, nothing from a network, light and dark, phone and wide screen."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from typing import Any

from moepp.analysis.comparison import headings, is_number, shown_columns, text_of
from moepp.analysis.figures import Figure
from moepp.io.untrusted import terminal_text


@dataclass
class Page:
    """Parts of a page, in order; every text is escaped here and nowhere else.

    Attributes:
        title: heading of the page.
        lead: one sentence below it.
        writer: the command that writes it.
        files: what is written beside it, by names relative to it.
    """

    title: str
    lead: str
    writer: str = "moepp report"
    files: Sequence[str] = ()
    _parts: list[str] = field(default_factory=list)

    def notes(self, notes: Sequence[str]) -> None:
        """Add remarks that a reader must not miss; nothing where there are none."""
        if notes:
            items = "".join(f"<li>{_text(note)}</li>" for note in notes)
            self._parts.append(f'<ul class="notes">{items}</ul>')

    def cards(self, cards: Sequence[tuple[str, str, str]]) -> None:
        """Add a row of numbers: (what, value, where it comes from)."""
        items = "".join(
            f'<div><dt>{_text(what)}</dt><dd>{_text(value)}</dd><dd class="source">{_text(source)}</dd></div>'
            for what, value, source in cards
        )
        self._parts.append(f'<dl class="cards">{items}</dl>')

    def section(self, heading: str, note: str = "") -> None:
        """Start a section."""
        self._parts.append(f"<h2>{_text(heading)}</h2>" + (f"<p>{_text(note)}</p>" if note else ""))

    def figures(self, figures: Sequence[Figure]) -> None:
        """Add figures side by side, each with its caption and its numbers."""
        self._parts.append('<div class="figures">' + "".join(_figure(figure) for figure in figures) + "</div>")

    def table(self, rows: Sequence[Mapping[str, Any]], caption: str) -> None:
        """Add a table of a comparison."""
        columns = shown_columns(rows)
        header = headings(columns)
        cells = [[text_of(column, row[column]) for column in columns] for row in rows]
        numeric = {number for number, column in enumerate(columns) if is_number(column)}
        self._parts.append(_table(header, cells, caption, numeric))

    def plain_table(
        self, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, numeric: bool = True
    ) -> None:
        """Add a table of texts; ``numeric``: columns after the first are numbers."""
        self._parts.append(_table(header, rows, caption, set(range(1, len(header))) if numeric else set()))

    def details(self, summary: str, text: str) -> None:
        """Add a text that is folded away."""
        body = _text(terminal_text(text))
        self._parts.append(f'<details><summary>{_text(summary)}</summary><pre tabindex="0">{body}</pre></details>')

    def markup(self, safe: str) -> None:
        """Add markup whose texts are escaped already."""
        self._parts.append(safe)

    def render(self) -> str:
        """Return the page."""
        style = package_files("moepp.analysis").joinpath("style.css").read_text(encoding="utf-8")
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><meta name="generator" content="{_text(self.writer)}">'
            f'<meta name="files" content="{_text(" ".join(self.files))}">'
            f"<title>{_text(self.title)}</title><style>{style}</style></head>"
            f"<body><main><h1>{_text(self.title)}</h1><p>{_text(self.lead)}</p>"
            + "\n".join(self._parts)
            + "</main></body></html>\n"
        )


def _text(text: object) -> str:
    return html.escape(terminal_text(str(text)), quote=True)


def _breakable(text: str) -> str:
    """Return a name that may be broken behind underscores, so that columns are no wider than their numbers."""
    return _text(text).replace("_", "_<wbr>")


def _figure(figure: Figure) -> str:
    numbers = ""
    if figure.rows:
        table = _table(figure.header, figure.rows, f"Numbers of: {figure.title}", set(range(1, len(figure.header))))
        numbers = f"<details><summary>Numbers</summary>{table}</details>"
    caption = f"<figcaption>{_text(figure.caption)}</figcaption>"
    source = f'<p class="source">From {_text(figure.source)}</p>' if figure.source else ""
    return f"<figure><h3>{_text(figure.title)}</h3>{figure.svg}{caption}{source}{numbers}</figure>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, numeric: set[int]) -> str:
    def cell(column: int, text: str) -> str:
        kind = ' class="number"' if column in numeric else ""
        return f'<th scope="row">{_breakable(text)}</th>' if column == 0 else f"<td{kind}>{_text(text)}</td>"

    def heading(column: int, name: str) -> str:
        kind = ' class="number"' if column in numeric else ""
        return f'<th scope="col"{kind}>{_breakable(name)}</th>'

    head = "".join(heading(column, name) for column, name in enumerate(header))
    body = "".join("<tr>" + "".join(cell(c, text) for c, text in enumerate(row)) + "</tr>" for row in rows)
    label = html.escape(caption, quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<caption>{_text(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )

"""The folder of a page: who may write there, and what an earlier page left that a new one does not have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moepp.analysis.comparison import write_table
from moepp.analysis.figures import Figure
from moepp.analysis.page import Page
from moepp.errors import RunError
from moepp.io import files
from moepp.io.untrusted import printable, read_part
from moepp.io.write_errors import write_error
from moepp.runs.directory import RunDir

PAGE, FIGURES = "report.html", "figures"
_HEAD_BYTES = 1 << 16
_WRITER = re.compile(rb'name="generator" content="(moepp (?:report|analyze [a-z-]+))"')
_FILES = re.compile(rb'name="files" content="([^"<>]*)"')
# What pages may have beside them; a page that somebody wrote by hand names nothing else.
_OWN = re.compile(r"figures/[A-Za-z0-9_-]+\.png|(comparison|seeds|differences)\.csv|[a-z-]+\.parquet")


def own_folder(folder: Path, writer: str, run: Path | None = None) -> Path:
    """Return the folder, unless it is another run's, or a page lies there that this command did not write.

    Args:
        folder: where a page is to be written.
        writer: "moepp report", or "moepp analyze" and its question.
        run: the directory of the run whose own page it is.

    Raises:
        RunError: it must not be written to.
    """
    is_run = RunDir(folder).metrics_file.exists() or RunDir(folder).config_file.exists()
    if is_run and (run is None or folder.resolve() != run.resolve()):
        raise RunError(f"{printable(folder)} is the directory of a run, whose page this is not; choose another --out")
    page = folder / PAGE
    if page.exists():
        found = _WRITER.search(_head(page))
        by = "" if found is None else found[1].decode()
        if by != writer and not (by == "moepp report" and _is_old_analysis(folder, writer)):
            other = f"; it is of {by}" if by else ""
            raise RunError(f"{printable(page)} was not written by {writer}{other}; choose another --out")
    return folder


def _is_old_analysis(folder: Path, writer: str) -> bool:
    """Return whether an earlier version analysed a model here, whose pages did not say so."""
    return writer != "moepp report" and any(folder.glob("*.parquet")) and not (folder / "comparison.csv").exists()


def write_page(
    page: Page, figures: Sequence[Figure], folder: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> Path:
    """Write ``report.html``, ``figures/*.png`` and tables; remove what the page that lay there had and this has not.

    Args:
        page: with its figures.
        figures: that are written beside it.
        folder: where, made if missing.
        tables: rows by the name of their file.

    Raises:
        WriteError: the folder cannot be written.
    """
    tables = {} if tables is None else tables
    before = _listed(folder / PAGE)
    files.make_folder(folder / FIGURES)
    for name, rows in tables.items():
        write_table(folder / name, rows)
    for figure in figures:
        files.write_whole(folder / FIGURES / f"{figure.name}.png", figure.png)
    page.files = [*tables, *dict.fromkeys(f"{FIGURES}/{figure.name}.png" for figure in figures)]
    for name in before:
        if name not in page.files:
            _remove(folder / name)
    files.write_whole(folder / PAGE, page.render())
    return folder / PAGE


def _head(page: Path) -> bytes:
    try:
        return read_part(page, _HEAD_BYTES)
    except OSError as error:
        raise RunError(
            f"cannot read {printable(page)}: {error.strerror}; remove it, or choose another --out"
        ) from error


def _listed(page: Path) -> list[str]:
    """Return the files that a page of ours names as its own."""
    if not page.is_file():
        return []
    head = _head(page)
    if _WRITER.search(head) is None:
        return []
    found = _FILES.search(head)
    if found is None:  # of an earlier version, which named none
        return ["seeds.csv", "differences.csv"] if (page.parent / "comparison.csv").exists() else []
    names = found[1].decode("utf-8", "replace").split()
    return [name for name in names if _OWN.fullmatch(name)]


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(error.errno, path, error.strerror) from error

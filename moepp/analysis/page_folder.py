"""The folder of a page: who may write there, and what an earlier page left that a new one does not have."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moepp.analysis.comparison import table_bytes
from moepp.analysis.figures import Figure
from moepp.analysis.page import Page
from moepp.errors import RunError
from moepp.io import files
from moepp.io.owners import require_safe_place
from moepp.io.untrusted import MAX_JSON_BYTES, printable, read_bytes, read_part
from moepp.io.write_errors import write_error
from moepp.runs.directory import RunDir

PAGE, FIGURES = "report.html", "figures"
_HEAD_BYTES = 1 << 16
_WRITER = re.compile(rb'name="generator" content="(moepp (?:report|analyze [a-z-]+))"')
_FILES = re.compile(rb'name="files" content="([^"<>]*)"')
# What pages may have beside them; a page that somebody wrote by hand names nothing else.
_OWN = re.compile(r"figures/[A-Za-z0-9_-]+\.png|(comparison|seeds|differences)\.csv|[a-z-]+\.parquet")


def own_folder(folder: Path, writer: str, run: Path | None = None, below: Path | None = None) -> Path:
    """Return the folder, unless it is another run's, or a page lies there that this command did not write.

    Args:
        folder: where a page is to be written.
        writer: "moepp report", or "moepp analyze" and its question.
        run: the directory of the run whose own page it is.
        below: a folder above it from which on no link is followed; None: the user has named the whole path.

    Raises:
        RunError: it must not be written to.
        WriteError: a link lies in the way, or others can replace what lies there.
    """
    require_safe_place(folder / FIGURES, folder if below is None else below)
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
    page: Page,
    figures: Sequence[Figure],
    folder: Path,
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    beside: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write ``report.html``, ``figures/*.png`` and tables; remove what the page that lay there had and this has not.

    All of it is made before any of it is written, and the page comes last: until then the earlier one is there.

    Args:
        page: with its figures.
        figures: that are written beside it.
        folder: where, made if missing.
        tables: rows by the name of their file.
        beside: other files of the run whose folder it is, by their names.

    Raises:
        RunError: a file lies there that is of no page.
        WriteError: the folder cannot be written.
    """
    contents: dict[str, str | bytes] = {name: table_bytes(name, rows) for name, rows in (tables or {}).items()}
    contents |= {f"{FIGURES}/{figure.name}.png": figure.png for figure in figures}
    before, are_all = _listed(folder / PAGE)
    new = [name for name in contents if name not in before and are_all]
    _refuse_foreign(folder, new)
    left = [name for name in before if name not in contents and os.path.lexists(folder / name)]
    page.files = [*contents, *left]  # what is left is removed last: until then it must be known as a page's
    text = page.render()
    files.make_folder(folder)
    files.make_own_folder(folder / FIGURES)
    if new:
        _claim(page, folder, [*before, *new])
    for name, content in {**(beside or {}), **contents}.items():
        files.write_whole(folder / name, content)
    files.write_whole(folder / PAGE, text)
    for name in left:
        _remove(folder, name)
    if left:
        page.files = list(contents)
        files.write_whole(folder / PAGE, page.render())
    return folder / PAGE


def _refuse_foreign(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if os.path.lexists(folder / name):
            raise RunError(
                f"{printable(folder / name)} lies there already and is of no page of moepp; choose another --out, or "
                "move it away"
            )


def _claim(page: Page, folder: Path, names: Sequence[str]) -> None:
    """Let a page name files before they are written: of what a kill leaves, it is known whose it is."""
    if (folder / PAGE).exists():
        earlier = read_bytes(folder / PAGE, MAX_JSON_BYTES, RunError, "remove it, or choose another --out")
        text = _FILES.sub(f'name="files" content="{" ".join(names)}"'.encode(), earlier, count=1)
    else:
        note = "This page was not finished; write it again."
        text = Page(page.title, note, page.writer, names).render().encode()
    files.write_whole(folder / PAGE, text)


def _head(page: Path) -> bytes:
    try:
        return read_part(page, _HEAD_BYTES)
    except OSError as error:
        raise RunError(
            f"cannot read {printable(page)}: {error.strerror}; remove it, or choose another --out"
        ) from error


def _listed(page: Path) -> tuple[list[str], bool]:
    """Return the files that a page of ours names as its own, and whether these are all that it has.

    Pages of an earlier version named none.
    """
    head = _head(page) if os.path.lexists(page) else b""
    if _WRITER.search(head) is None:
        return [], True
    found = _FILES.search(head)
    if found is None:
        return (["seeds.csv", "differences.csv"] if (page.parent / "comparison.csv").exists() else []), False
    names = found[1].decode("utf-8", "replace").split()
    return [name for name in names if _OWN.fullmatch(name)], True


def _remove(folder: Path, name: str) -> None:
    """Remove a file of a folder, or of its figures: not of those of another folder, to which a link leads."""
    try:
        with contextlib.ExitStack() as stack:
            inner = name.split("/")
            place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, place)
            for part in inner[:-1]:
                place = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
                stack.callback(os.close, place)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(inner[-1], dir_fd=place)
    except OSError as error:
        raise write_error(error.errno, folder / name, error.strerror) from error

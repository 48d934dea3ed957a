"""Folders of pages: what is never written over or removed, and what a kill or a full disk leaves."""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moepp.analysis import figures, page_folder
from moepp.analysis.page import Page
from moepp.analysis.page_folder import own_folder, write_page
from moepp.cli import eval as evaluate
from moepp.cli import report as command
from moepp.errors import RunError, WriteError
from moepp.io import files
from moepp.metrics.tensorboard import TensorBoardSink
from moepp.runs.directory import RunDir
from moepp.training.token_tables import _write
from tests.run_files import make_run


class Killed(BaseException):
    """What no handler of errors catches, like the end of the process."""


@pytest.fixture(autouse=True)
def no_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_png", lambda draw: b"png")
    monkeypatch.setattr(figures, "_svg", lambda *of: "<svg></svg>")


def report(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(map(str, arguments))))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def page_that_lists(*names: str) -> str:
    return f'<meta name="generator" content="moepp report"><meta name="files" content="{" ".join(names)}">'


# --- links


def test_a_planted_link_in_a_run_leads_no_page_out_of_it(tmp_path: Path) -> None:
    run, victim = make_run(tmp_path, "run"), tmp_path / "victim"
    victim.mkdir()
    (victim / "holiday.png").write_text("mine")
    (run / "figures").symlink_to(victim)
    (run / "report.html").write_text(page_that_lists("figures/holiday.png"))
    before = content(run)
    with pytest.raises(WriteError, match="figures: a symbolic link lies there"):
        report(run)
    assert content(run) == before and content(victim) == {"holiday.png": b"mine"}
    with pytest.raises(WriteError):
        page_folder._remove(run, "figures/holiday.png")  # of a link that was put there in the meantime
    assert content(victim) == {"holiday.png": b"mine"}


def found(run: Path) -> Any:
    """What ``moepp eval`` knows of a run before it reads any document."""
    return SimpleNamespace(run_dir=RunDir(run), subject=SimpleNamespace(step=1))


@pytest.mark.parametrize(
    ("link", "write"),
    [
        ("tokens", lambda run: _write({"kinds": [{"layer": 1}]}, run / "tokens")),
        ("tensorboard", lambda run: TensorBoardSink(run, 64)),
        ("analysis", lambda run: own_folder(run / "analysis/tokens", "moepp analyze tokens", below=run)),
        ("analysis/tokens", lambda run: own_folder(run / "analysis/tokens", "moepp analyze tokens", below=run)),
        ("comparison", lambda run: report(run.parent / "runs")),
        ("eval", lambda run: evaluate._load_benchmarks(argparse.Namespace(output=None), found(run))),
    ],
)
def test_folders_in_a_run_are_no_links(
    tmp_path: Path, link: str, write: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    for name in ("one", "two"):
        make_run(tmp_path / "runs", name)
    place = (tmp_path / "runs" if link == "comparison" else run) / link
    place.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "victim").mkdir()
    place.symlink_to(tmp_path / "victim")
    try:
        write(run)
    except WriteError as error:
        caplog.clear()
        assert "a symbolic link lies there" in str(error)
    else:
        assert "a symbolic link lies there" in caplog.text  # tables of tokens end no run
    assert content(tmp_path / "victim") == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="gives folders to other users")
def test_no_page_goes_where_another_user_lets_everybody_replace_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    (run / "figures").mkdir()
    for place in (run, run / "figures"):
        os.chown(place, 12345, 12345)
        place.chmod(0o777)
        with pytest.raises(WriteError, match="everybody may write to it"):
            report(run)
        os.chown(place, 0, 0)
    assert report(run) == 0


# --- files of the user, kills and full disks


def write(folder: Path, *names: str) -> Path:
    """Write a page with a table, figures of these names, and the summary of a run."""
    drawn: list[Any] = [SimpleNamespace(name=name, png=name.encode(), svg="", rows=()) for name in names]
    page, tables = Page(" ".join(names), ""), {"comparison.csv": [{"run": name} for name in names]}
    return write_page(page, drawn, folder, tables, {"summary.md": " ".join(names)})


def test_files_that_are_of_no_page_are_not_replaced(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, one) for one in ("a", "b")]
    for number, name in enumerate(("comparison.csv", "figures/loss.png")):
        out = tmp_path / f"paper{number}"
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(RunError, match=rf"/{re.escape(name)} lies there already and is of no page of moepp"):
            report(*runs, "--out", out) if number == 0 else write(out, "time", "loss")
        assert content(out) == {name: b"mine"}
        (out / name).rename(out / "mine")
        assert write(out, "time", "loss") == write(out, "loss") == out / "report.html"
        assert (out / "mine").read_text() == "mine" and not (out / "figures/time.png").exists()


@pytest.mark.parametrize("earlier", [(), ("loss", "time"), ("gates",)])
def test_an_interrupted_page_leaves_the_earlier_one_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: tuple[str, ...]
) -> None:
    """``earlier``: figures of the page that lay there."""
    write(tmp_path / "wanted", "loss", "time")
    write_whole, count, last = files.write_whole, 0, 0
    wanted, error = content(tmp_path / "wanted") | {"figures/own.png": b"mine"}, None

    def interrupted(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > last and error is not None:
            raise error
        write_whole(*arguments)

    monkeypatch.setattr(files, "write_whole", interrupted)
    for last, one in itertools.product(range(10), (Killed(), OSError(errno.ENOSPC, "full"))):
        out, error = tmp_path / f"{last}{type(one).__name__}", None
        (out / "figures").mkdir(parents=True)
        (out / "figures/own.png").write_text("mine")
        before = write(out, *earlier).read_text() if earlier else ""
        count, error = 0, one
        try:
            write(out, "loss", "time")
        except (Killed, OSError):
            text = (out / "report.html").read_text() if (out / "report.html").exists() else ""
            written = last == 6 and earlier == ("gates",)  # all but the list of its files
            expected = body(content(tmp_path / "wanted")["report.html"].decode()) if written else body(before)
            assert body(text) == expected or (not earlier and "was not finished" in text)
        else:
            assert content(out) == wanted and count == last
            return
        error = None
        write(out, "loss", "time")
        assert content(out) == wanted
    raise AssertionError("it never ended")


def body(page: str) -> str:
    return page.partition("<title>")[2]


def test_a_report_of_a_run_is_made_before_any_of_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, "run")
    assert report(run) == 0
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 50, "tokens": 5000, "train/loss": 3.5}\n')
    before = content(run)
    with monkeypatch.context() as patch:
        patch.setattr("moepp.analysis.page.Page.render", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            report(run)
    assert content(run) == before
    assert report(run) == 0 and content(run)["summary.md"] != before["summary.md"]

"""What `moepp watch` shows of a run's files."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from moepp.analysis.runs import read_run
from moepp.analysis.watch import duration, panel, remaining_seconds, sparkline, warnings_of
from moepp.cli.main import main
from tests.run_files import make_run


def shown(path: Path, now: float | None = None) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120, highlight=False).print(panel(read_run(path), now))
    return stream.getvalue()


def test_sparkline_keeps_the_shape_at_any_length():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3.0, 3.0]) == "▁▁"
    long = sparkline(list(range(1000)), 8)
    assert long == "▁▂▃▄▅▆▇█"


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (65, "1 min 5 s"), (3700, "1 h 1 min"), (90000, "1 d 1 h"), (3600, "1 h 0 min")]
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_the_newest_of_everything_is_shown(tmp_path):
    path = make_run(tmp_path, "one")
    checkpoint = path / "checkpoints/step-00000040"
    checkpoint.mkdir(parents=True)
    (checkpoint / "data").write_bytes(b"x" * 2_500_000)
    (path / "log").mkdir()
    (path / "log/rank-0.txt").write_text("2026-01-01 00:00:02 INFO a\n2026-01-01 00:00:03 WARNING late \x1b[31m\n")
    (path / "log/rank-1.txt").write_text("2026-01-01 00:00:01 ERROR early\n")
    now = os.stat(path / "metrics.jsonl").st_mtime + 90
    text = shown(path, now)
    assert "one" in text and "4,000 tokens" in text and "last record 1 min 30 s ago" in text
    assert "4.0000" in text and "4.2500" in text and "60.0%" in text and "2.50" in text
    assert "step-00000040, 2.5 MB" in text
    assert text.index("ERROR early") < text.index("WARNING late") and "\x1b" not in text
    assert warnings_of(read_run(path))[0].startswith("rank-1: ")


def test_time_left_follows_the_newest_throughput(tmp_path):
    run = read_run(make_run(tmp_path, "one"))
    run = type(run)(run.path, run.records, {"train": {"steps": 60}}, run.config)
    assert remaining_seconds(run) == pytest.approx(20 * 100 / 400.0)  # steps left x tokens per step / tokens per second
    assert remaining_seconds(type(run)(run.path, run.records, {}, None)) is None


def test_a_run_that_has_logged_nothing_more_than_its_loss_is_shown(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "train/loss": 2.5}\n')
    text = shown(tmp_path)
    assert "2.5000" in text and "no checkpoint yet" in text and "layer" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "is not a directory"),
        (["."], "is no run (no config.yaml, no metrics.jsonl)"),
        (["run", "--seconds", "0"], "--seconds=0.0 is not between 0.1 and 3600"),
    ],
)
def test_bad_input_is_said_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    make_run(tmp_path, "run")
    monkeypatch.chdir(tmp_path)
    assert main(["watch", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_output_that_is_no_terminal_is_written_once(tmp_path, capsys):
    assert main(["watch", str(make_run(tmp_path, "run"))]) == 0
    assert "4,000 tokens" in capsys.readouterr().out

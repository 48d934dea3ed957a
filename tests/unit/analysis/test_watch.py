"""What `moepp watch` shows of a run's files."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path

import pytest
from rich.console import Console

from moepp.analysis.runs import read_run
from moepp.analysis.watch import duration, panel, remaining_seconds, sparkline, state, warnings_of
from moepp.cli.main import main
from moepp.cli.watch import look
from tests.run_files import make_run


def shown(path: Path, now: float | None = None, width: int = 120) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(panel(read_run(path), now, width))
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


def test_state_of_a_run_is_what_its_files_and_this_host_tell(tmp_path):
    done = read_run(make_run(tmp_path, "done"))
    assert state(done) == "finished"
    path = make_run(tmp_path, "one", records=2)
    assert state(read_run(path)) == "not running here"
    lock = path / ".lock"
    lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\nabc\n")
    assert state(read_run(path)) == f"running: process {os.getpid()} on {socket.gethostname()}"
    lock.write_text(f"process 4194305 on {socket.gethostname()}\nabc\n")
    assert state(read_run(path)) == f"not running: process 4194305 on {socket.gethostname()} has ended"
    lock.write_text("process 1 on another-host\nabc\n")
    assert state(read_run(path)) == "last held by process 1 on another-host"
    lock.write_bytes(b"\xff\x00 process")
    assert state(read_run(path)) == "not running here"


def test_health_of_the_ranks_names_logs_errors_and_who_is_slow(tmp_path):
    path = make_run(tmp_path, "one")
    (path / "environment.json").write_text('{"world_size": 4}')
    (path / "log").mkdir()
    (path / "log/rank-0.txt").write_text("2026-01-01 00:00:02 INFO fine\n")
    (path / "log/rank-2.txt").write_text("2026-01-01 00:00:02 ERROR lost\n")
    text = " ".join(shown(path, width=300).split())
    assert "ranks: 2 of 4; no log of rank 1, 3; errors in the log of rank 2" in text
    assert "rank 1 was the slowest in 2 of the last 4 records; forward: slowest 1.50 times the mean" in text
    (path / "environment.json").write_text("{")
    assert "ranks: 2; errors in the log of rank 2" in shown(path, width=300)


@pytest.mark.parametrize("width", [40, 60, 200])
def test_lines_fit_the_terminal_and_numbers_stay_whole(tmp_path, width):
    path = make_run(tmp_path, "one")
    lines = shown(path, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert any("4.0000" in line and "training loss" in line for line in lines)
    assert not any("…" in line for line in lines)


def test_a_look_at_what_is_being_written_says_so_and_raises_nothing(tmp_path):
    path = make_run(tmp_path, "one")
    with (path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 50, "tok')
    assert "4,000 tokens" in rendered(look(path, 100))
    (path / "metrics.jsonl").write_text('oops\n{"step": 1, "tokens": 8}\n')
    assert "cannot be read now" in rendered(look(path, 100))
    (path / "metrics.jsonl").write_text("")
    assert rendered(look(path, 100)).strip() == "waiting for the first record"


def rendered(view: object) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100, highlight=False).print(view)
    return stream.getvalue()


def test_values_that_are_not_finite_are_said(tmp_path):
    path = make_run(tmp_path, "one")
    assert "not finite" not in shown(path)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "tokens": 5000, "train/loss": null}\n')
    assert "train/loss is not finite in 1 of" in shown(path)


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
    (tmp_path / "run/metrics.jsonl").unlink()
    assert main(["watch", str(tmp_path / "run")]) == 0
    assert "waiting for the first record" in capsys.readouterr().out

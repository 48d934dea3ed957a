"""What `moepp watch` shows of a run's files."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import time
from pathlib import Path

import pytest
from rich.console import Console

from moepp.analysis.log_lines import log_tails, seconds_of, warnings_of
from moepp.analysis.run_state import state_of
from moepp.analysis.runs import read_run
from moepp.analysis.watch import duration, panel, remaining_seconds, sparkline
from moepp.cli.main import main
from moepp.cli.watch import look
from moepp.metrics import close_logging, setup_logging
from moepp.metrics.jsonl import JsonlSink
from moepp.runs.lock import RunLock
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
    assert warnings_of(log_tails(read_run(path)))[0].startswith("rank-1: ")


@pytest.fixture
def lock(tmp_path):
    """A run of which this process holds the lock, written to since."""
    path = make_run(tmp_path, "one", records=2)
    with_lock = RunLock.acquire(path / ".lock")
    touch(path / ".lock", NOW - 100)
    touch(path / "metrics.jsonl", NOW - 5)
    yield path
    with_lock.release()


NOW = 2_000_000_000.0


def touch(path: Path, time: float) -> None:
    os.utime(path, (time, time))


def state(path: Path, now: float = NOW) -> tuple[str, str]:
    found = state_of(path, read_run(path) if (path / "metrics.jsonl").stat().st_size else None, now)
    return found.name, found.text


def headline(path: Path, now: float = NOW) -> str:
    return shown(path, now, width=400).splitlines()[0]


def checkpoint(path: Path, step: int) -> None:
    (path / f"checkpoints/step-{step:08d}").mkdir(parents=True)


def test_a_running_run_says_how_long_it_will_take(lock):
    me = f"process {os.getpid()} on {socket.gethostname()}"
    assert state(lock) == ("running", f"running: {me}")
    assert "10 s left at this pace" in headline(lock)  # 20 steps of 100 tokens at 200 tokens per second
    checkpoint(lock, 20)
    assert state(lock)[0] == "running"


def test_a_run_whose_records_are_overdue_is_silent_and_promises_no_end(lock):
    assert state(lock, NOW + 110)[0] == "running"
    name, text = state(lock, NOW + 3600)
    assert name == "silent" and "lives, but records are overdue" in text
    assert "left" not in headline(lock, NOW + 3600)


def test_a_run_that_was_started_again_has_no_new_record_yet(lock):
    touch(lock / ".lock", NOW - 2)
    name, text = state(lock)
    assert name == "continued" and text.startswith("running: ") and "no record since it was started again" in text
    assert "left at this pace" in headline(lock)


def test_records_that_a_restart_drops_are_no_new_ones(lock):
    """After a kill, those behind the checkpoint are taken out of metrics.jsonl, which is then written anew."""
    touch(lock / "metrics.jsonl", NOW - 5000)
    sink = JsonlSink(lock / "metrics.jsonl", start_step=10)
    assert [record["step"] for record in read_run(lock).records] == [10]
    assert state(lock)[0] == "continued" and "last record 1 h 23 min ago" in headline(lock)
    touch(lock / ".lock", time.time() - 100)
    sink.log({"train/loss": 1.0}, 11, 1100)
    assert state(lock, time.time())[0] == "running"
    sink.close()


def test_a_run_whose_process_has_ended_says_what_is_saved_and_promises_no_end(tmp_path):
    path = make_run(tmp_path, "one", records=2)
    ended = f"process {os.getpid()} on {socket.gethostname()}"  # it lives, and has not the lock: another of its number
    (path / ".lock").write_text(f"{ended}\nabc\n")
    assert state(path)[0] == "killed" and "nothing is saved" in state(path)[1]
    checkpoint(path, 10)
    wanted = f"not running: {ended} has ended; it would go on from step 10, 10 steps before its last record"
    assert state(path) == ("killed", wanted)
    checkpoint(path, 20)
    assert state(path) == ("stopped", f"not running: {ended} has ended; all of it is saved: start it again to go on")
    assert "left at" not in headline(path)


def test_a_finished_run_is_finished_whoever_has_it(tmp_path):
    path = make_run(tmp_path, "done")
    assert state(path) == ("finished", "finished") and "left" not in headline(path)
    lock = RunLock.acquire(path / ".lock")
    assert state(path) == ("finished", f"finished; process {os.getpid()} on {socket.gethostname()} still writes")
    lock.release()
    assert state(path) == ("finished", "finished")


def test_a_run_whose_last_step_is_not_saved_is_not_finished(tmp_path):
    path = make_run(tmp_path, "done")
    checkpoint(path, 10)
    assert state(path) == ("idle", "not running here; it would go on from step 10, 30 steps before its last record")
    ended = f"process {os.getpid()} on {socket.gethostname()}"
    (path / ".lock").write_text(f"{ended}\nabc\n")
    text = f"not running: {ended} has ended; it would go on from step 10, 30 steps before its last record"
    assert state(path) == ("killed", text)
    (path / "checkpoints/step-00000010").rmdir()
    assert state(path)[0] == "killed" and "nothing is saved" in state(path)[1]
    checkpoint(path, 40)
    assert state(path) == ("finished", "finished")


def test_of_another_host_only_its_records_tell(tmp_path):
    path = make_run(tmp_path, "one", records=2)
    (path / ".lock").write_text("process 1 on another-host\nabc\n")
    touch(path / "metrics.jsonl", NOW - 5)
    assert state(path) == ("elsewhere", "on another host: process 1 on another-host")
    assert "left at this pace" in headline(path)
    assert state(path, NOW + 3600) == ("silent", "no new record; last held by process 1 on another-host")
    assert "left at" not in headline(path, NOW + 3600)
    for broken in (b"\xff\x00 process", b""):
        (path / ".lock").write_bytes(broken)
        assert state(path)[0] == "idle" and "left at" not in headline(path)


def test_a_run_without_a_record_says_whether_one_will_come(lock):
    (lock / "metrics.jsonl").write_text("")
    me = f"process {os.getpid()} on {socket.gethostname()}"
    assert state(lock) == ("waiting", f"waiting for the first record; running: {me}")
    (lock / ".lock").write_text("process 1 on another-host\n")
    assert state(lock) == ("waiting", "waiting for the first record; last held by process 1 on another-host")
    (lock / ".lock").write_text(f"process 4194305 on {socket.gethostname()}\n")
    assert state(lock)[0] == "killed" and "has ended" in state(lock)[1]
    (lock / ".lock").unlink()
    assert state(lock) == ("waiting", "waiting for the first record; not running here")


def test_named_validation_sets_are_shown(tmp_path):
    path = make_run(tmp_path, "one")
    with (path / "metrics.jsonl").open("a") as file:
        for number in range(10):
            file.write(json.dumps({"step": 40, "tokens": 4000, f"eval/set{number}/loss": 5.5 + number}) + "\n")
    text = shown(path)
    assert "loss on set0" in text and "5.5000" in text and "12.5000" in text and "and 2 other sets" in text


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


def test_health_is_that_of_the_present_start_and_its_ranks(tmp_path):
    path = make_run(tmp_path, "one")
    (path / "log").mkdir()
    (path / ".lock").write_text("process 1 on elsewhere\n")
    start = (path / ".lock").stat().st_mtime
    before, after = (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start + s)) for s in (-60, 60))
    for rank in range(4):
        (path / f"log/rank-{rank}.txt").write_text(f"{before} ERROR of the start before\n")
    (path / "environment.json").write_text('{"world_size": 4}')
    assert "ranks: 4 of 4; no errors in their logs" in shown(path, width=300)
    with (path / "log/rank-1.txt").open("a") as file:
        file.write(f"{after} ERROR lost\n")
    assert "ranks: 4 of 4; errors in the log of rank 1;" in shown(path, width=300)
    (path / "log/rank-3.txt").write_text(f"{after} ERROR of a rank that is no more\n")
    (path / "environment.json").write_text('{"world_size": 2}')
    assert "ranks: 2 of 2; errors in the log of rank 1;" in shown(path, width=300)
    (path / "environment.json").write_text('{"world_size": 1}')
    assert "rank 0 was the slowest in 2 of the last 2 records" in shown(path, width=300)


@pytest.fixture(params=["Asia/Tokyo", "America/Los_Angeles"])
def far_away(request, monkeypatch):
    """The viewer's time zone is not the host's."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_errors_of_a_host_in_another_time_zone_are_those_of_the_present_start(tmp_path, monkeypatch, far_away):
    path = make_run(tmp_path, "one")
    setup_logging(path, 1)
    here, now = logging.getLogger("moepp.training"), time.time()
    try:
        with monkeypatch.context() as patch:
            patch.setenv("TZ", "Europe/Berlin")
            time.tzset()
            here.error("lost")
    finally:
        close_logging()
        time.tzset()
    line = (path / "log/rank-1.txt").read_text()
    assert now - 1 <= (seconds_of(line) or 0) <= time.time()
    (path / ".lock").write_text("process 1 on elsewhere\n")
    for taken, told in ((now - 60, "errors in the log of rank 1"), (now + 60, "no errors in their logs")):
        touch(path / ".lock", taken)
        assert told in shown(path, width=300)


def test_times_in_logs_are_read_with_and_without_a_zone(far_away):
    assert seconds_of("2026-01-02 03:04:05,678Z ERROR a") == 1767323045
    assert seconds_of("2026-01-02 03:04:05,678 ERROR a") == time.mktime((2026, 1, 2, 3, 4, 5, 0, 0, -1))
    for line in ("", "ERROR", "2026-13-02 03:04:05 ERROR", "2026-01-02 03:04:05,678+01:00 a"):
        assert seconds_of(line) is None


def test_warnings_are_in_the_order_of_time_and_further_lines_belong_to_theirs(tmp_path):
    path = make_run(tmp_path, "one")
    (path / "log").mkdir()
    (path / "log/rank-0.txt").write_text("2026-01-01 00:00:03,000Z WARNING first\n  CRITICAL: second\n")
    (path / "log/rank-1.txt").write_text("2026-01-01 00:00:02,000Z ERROR zeroth\n")
    said = warnings_of(log_tails(read_run(path)))
    assert [line.split()[-1] for line in said] == ["zeroth", "first", "second"]


def test_logs_that_cannot_be_read_are_said(tmp_path):
    path = make_run(tmp_path, "one")
    (path / "log/rank-3.txt").mkdir(parents=True)
    (path / "log/notes.txt").mkdir()  # no log of a rank
    text = " ".join(shown(path, width=300).split())
    assert "no errors in their logs; cannot read the log of rank 3" in text
    assert "rank-3: its log cannot be read: it is not a regular file" in text and "notes" not in text


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
    assert "waiting for the first record; not running here" in rendered(look(path, 100))


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

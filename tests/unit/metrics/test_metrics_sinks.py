"""metrics.jsonl, console, progress bar and log files."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moepp.errors import RunError
from moepp.metrics import SinkGroup, close_logging, setup_logging
from moepp.metrics.console import BarSink, LineSink
from moepp.metrics.csv import CsvSink
from moepp.metrics.jsonl import JsonlSink, read_records
from moepp.metrics.sinks import Record


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    yield
    close_logging()


def write(path: Path, steps: list[int], start_step: int = 0) -> None:
    sink = JsonlSink(path, start_step)
    for step in steps:
        sink.log({"train/loss": step + 0.5}, step, step * 100)
    sink.close()


def test_each_record_is_one_flushed_line_with_step_and_tokens(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log({"train/loss": 2.5, "comm/dispatch_bytes": 2**53}, 10, 5120)
    assert json.loads(path.read_text()) == {
        "step": 10, "tokens": 5120, "train/loss": 2.5, "comm/dispatch_bytes": 2**53,
    }  # fmt: skip
    sink.close()


def test_values_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log({"a": math.nan, "b": math.inf, "c": 1.0}, 1, 2)
    sink.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "tokens": 2, "a": None, "b": None, "c": 1.0}


def test_resuming_drops_later_records_and_the_torn_line_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [10, 20, 30, 40])
    with path.open("a") as file:
        file.write('{"step": 50, "tok')
    write(path, [30], start_step=20)
    records = read_records(path)
    assert [record["step"] for record in records] == [10, 20, 30]
    assert [record["train/loss"] for record in records] == [10.5, 20.5, 30.5]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_interrupted_truncation_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [10, 20, 30])
    before = path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moepp.metrics.jsonl.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonlSink(path, start_step=10)
    assert path.read_bytes() == before


class FullDisk:
    """A file that takes ``space`` more bytes."""

    def __init__(self, file: Any, space: int) -> None:
        self.file, self.space = file, space

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        if not self.space:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.file.write(data[: self.space])
        self.space -= taken
        return taken


def full_disk(file: Any) -> Any:
    return FullDisk(file, space=0)


def test_records_wait_for_space_on_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log({"train/loss": 1.0}, 1, 10)
    disk: Any = FullDisk(sink._file, space=7)
    sink._file = disk
    for step in (2, 3):
        sink.log({"train/loss": float(step)}, step, 10 * step)
        sink.sync()
    assert [record["step"] for record in read_records(path)] == [1]
    assert caplog.text.count("records are kept in memory: No space left on device") == 1
    disk.space = 10**6
    sink.log({"train/loss": 4.0}, 4, 40)
    sink.close()
    assert [record["train/loss"] for record in read_records(path)] == [1.0, 2.0, 3.0, 4.0]


def test_records_that_never_found_space_are_an_error_at_the_end(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink._file = full_disk(sink._file)
    sink.log({"train/loss": 1.0}, 1, 10)
    with pytest.raises(RunError, match=r"No space left on device; free the disk"):
        sink.close()


@pytest.mark.parametrize("line", ["[1, 2]", "hello", '{"tokens": 1}', '{"step": "1", "tokens": 1}'])
def test_file_of_something_else_is_refused_and_kept(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(RunError, match=r"line 1 is not a JSON object with step and tokens"):
        JsonlSink(path, start_step=5)
    assert path.read_text() == line + "\n"


def test_unwritable_place_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError) as caught:
        JsonlSink(tmp_path / "metrics.jsonl")
    assert "\n" not in str(caught.value)


class Recorder:
    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.seen: list[tuple[dict, int, int]] = []
        self.closed = 0

    def log(self, record: Record, step: int, tokens: int) -> None:
        self.seen.append((dict(record), step, tokens))
        if self.fails and step > 3:
            raise OSError("service died\nat once")

    def close(self) -> None:
        self.closed += 1
        if self.fails:
            raise OSError("no answer")


def test_group_passes_records_to_all_and_closes_all_even_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    sinks = [Recorder(), Recorder(fails=True), Recorder()]
    group = SinkGroup(sinks)
    group.log({"a": 1.0}, 3, 30)
    group.close()
    assert [sink.seen for sink in sinks] == [[({"a": 1.0}, 3, 30)]] * 3
    assert [sink.closed for sink in sinks] == [1, 1, 1]
    assert caplog.messages == ["Recorder could not be closed: OSError: no answer"]


def test_sink_that_fails_is_reported_once_and_gets_no_more(caplog: pytest.LogCaptureFixture) -> None:
    sinks = [Recorder(fails=True), Recorder()]
    group = SinkGroup(sinks)
    for step in range(1, 7):
        group.log({"a": 1.0}, step, step)
    assert [len(sink.seen) for sink in sinks] == [4, 6]
    assert caplog.messages == ["Recorder failed at step 4 and gets no more records: OSError: service died at once"]


def test_group_of_a_directory_that_is_not_its_own_any_more_writes_nothing(tmp_path: Path) -> None:
    taken = False

    def check() -> None:
        if taken:
            raise RunError("taken over")

    sink = JsonlSink(tmp_path / "metrics.jsonl")
    group = SinkGroup([sink], check)
    group.log({"a": 1.0}, 1, 1)
    taken = True
    for action in (lambda: group.log({"a": 1.0}, 2, 2), group.sync, lambda: group.rewind(0, 0), group.close):
        with pytest.raises(RunError, match="taken over"):
            action()
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1]


def test_error_that_ends_the_run_is_not_hidden_by_one_in_closing(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with pytest.raises(KeyError), SinkGroup([sink]):
        sink._file = full_disk(sink._file)
        sink.log({"a": 1.0}, 1, 1)
        raise KeyError


@pytest.mark.parametrize("how", ["removed", "replaced", "folder replaced"])
def test_metrics_that_were_removed_or_replaced_are_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    write(path, [1, 2])
    path.chmod(0o600)
    sink = JsonlSink(path, start_step=2)
    sink.log({"train/loss": 3.5}, 3, 300)
    if how == "removed":
        path.unlink()
    elif how == "replaced":
        other = tmp_path / "other"
        other.write_text("other\n")
        other.replace(path)
    else:
        path.parent.rename(tmp_path / "moved")
        path.parent.mkdir()
    sink.log({"train/loss": 4.5}, 4, 400)
    sink.log({"train/loss": 5.5}, 5, 500)
    sink.close()
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4, 5]
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(caplog.messages) == 1 and "removed or replaced" in caplog.messages[0]
    if how == "replaced":
        assert (path.parent / "metrics.jsonl.replaced-1").read_text() == "other\n"


def test_metrics_that_were_truncated_are_an_error_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in (1, 2):
        sink.log({"train/loss": 1.0}, step, step)
        os.truncate(path, 0)
    with pytest.raises(RunError, match="was truncated while the run wrote it"):
        sink.close()


WHOLE = b'{"step": 1, "tokens": 10}\n{"step": 2, "tokens": 20}\n'


@pytest.mark.parametrize(
    "tail",
    [
        b"\0" * 40 + b"\n",
        b'{"step": 3, "tok\0\0\0\0\0\0\n',
        b'{"step": 3, "tok\n',
        b"\0\0\0\0\n\0\0\n\0\0",
        b"\xff\xfe{{{\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_damaged_end_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE + tail)
    assert [record["step"] for record in read_records(path)] == [1, 2]
    assert "from line 3 on, are damaged and left out" in caplog.messages[0]
    write(path, [3], start_step=2)  # an unattended restart
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]


def test_file_of_zeros_is_damaged_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\0" * 100 + b"\n")
    write(path, [1])
    assert [record["step"] for record in read_records(path)] == [1]


def test_damage_before_a_record_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE + b"\0\0\0\n" + WHOLE)
    with pytest.raises(RunError, match=r"metrics\.jsonl line 3 is not"):
        JsonlSink(path, start_step=5)
    assert path.read_bytes() == WHOLE + b"\0\0\0\n" + WHOLE


def test_last_record_without_the_end_of_its_line_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE.rstrip(b"\n"))
    write(path, [3], start_step=2)
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]


@pytest.mark.parametrize("place", ["metrics.jsonl", "log", "log/rank-0.txt"])
def test_planted_link_is_refused(tmp_path: Path, place: str) -> None:
    run_dir, aim = tmp_path / "run", tmp_path / "aim"
    (run_dir / place).parent.mkdir(parents=True)
    if place == "log":
        aim.mkdir()
    else:
        aim.write_text("")
    (run_dir / place).symlink_to(aim)
    with pytest.raises(RunError, match="a symbolic link lies there, which is not followed"):
        JsonlSink(run_dir / place) if place == "metrics.jsonl" else setup_logging(run_dir, 0)
    assert list(aim.iterdir()) == [] if place == "log" else aim.read_text() == ""


def test_log_file_that_is_moved_or_full_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path, 1)
    logger, path = logging.getLogger("moepp.training.trainer"), tmp_path / "log" / "rank-1.txt"
    logger.info("first")
    path.rename(tmp_path / "log" / "rotated.txt")
    logger.info("second")
    assert "first" in (tmp_path / "log" / "rotated.txt").read_text() and "second" in path.read_text()
    (tmp_path / "log").rename(tmp_path / "gone")
    for _ in range(3):
        logger.info("lost")
    (tmp_path / "gone").rename(tmp_path / "log")
    logger.info("third")
    said = capsys.readouterr().err
    assert said.count("rank-1.txt now, its lines are lost") == 1 and "Traceback" not in said
    assert "third" in path.read_text()


RECORD = {
    "train/loss": 5.25, "optim/lr": 3e-4, "routing/ffn_per_token": 1.4375, "throughput/tokens_per_second": 12345.6,
}  # fmt: skip


def test_line_shows_progress_and_the_time_left(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    sink = LineSink(total_steps=100, start_step=20, clock=lambda: now[0])
    sink.log({"eval/loss": 6.0}, 20, 40960)  # evaluated before the first step of a resumed run: no speed yet
    now[0] = 120.0
    with caplog.at_level(logging.INFO, logger="moepp"):
        sink.log(RECORD, 40, 81920)
        sink.log({"eval/loss": 5.5}, 40, 81920)
        sink.log({"train/loss": 1.0}, 100, 204800)
    assert caplog.messages[0] == (
        "step 40/100 | 81,920 tokens | loss 5.2500 | lr 3.00e-04 | FFN/token 1.438 | 12,346 tokens/s | ETA 0:06:00"
    )
    assert "eval loss 5.5000" in caplog.messages[1]
    assert "ETA" not in caplog.messages[2]


def test_line_shows_every_named_validation_set_and_benchmark(caplog: pytest.LogCaptureFixture) -> None:
    sink = LineSink(total_steps=2, clock=lambda: 0.0)
    record = {"eval/wiki/loss": 5.5, "eval/wiki/perplexity": 244.7, "eval/sciq/acc": 0.25, "eval/sciq/acc_stderr": 0.1}
    record |= {"eval/sciq/share_ffn": 0.6}
    with caplog.at_level(logging.INFO, logger="moepp"):
        sink.log(record, 2, 128)
    assert caplog.messages == ["step 2/2 | 128 tokens | eval wiki loss 5.5000 | eval sciq acc 0.2500"]


def test_table_that_cannot_be_rewound_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.csv"
    with SinkGroup([JsonlSink(tmp_path / "metrics.jsonl"), CsvSink(tmp_path)]) as sinks:
        sinks.log({"a": 1.0}, 1, 1)
        sinks.log({"a": math.nan}, 2, 2)
        assert path.read_text().splitlines() == ["step,tokens,a", "1,1,1.0", "2,2,"]
        path.unlink()
        path.mkdir()
        sinks.rewind(1, 1)
        sinks.log({"a": 3.0}, 2, 2)
    assert [message.partition(":")[0] for message in caplog.messages] == [
        f"{path} is not written now, but later anew",
        f"{path} lacks rows; the next start, and metrics.jsonl, have them",
    ]
    assert [record["a"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 3]


def test_bar_shows_step_loss_speed_and_ffn_experts_per_token() -> None:
    stream = io.StringIO()
    sink = BarSink(total_steps=50, start_step=10, stream=stream)
    sink.log(RECORD, 20, 1000)
    sink.log({"eval/loss": 5.5}, 20, 1000)
    sink.close()
    last = stream.getvalue().split("\r")[-1]
    for part in ("20/50", "loss 5.2500", "eval loss 5.5000", "12,346 tokens/s", "FFN/token 1.438"):
        assert part in last


def test_bar_shows_the_first_validation_set_where_the_training_data_have_no_such_part() -> None:
    stream = io.StringIO()
    sink = BarSink(total_steps=50, stream=stream)
    sink.log({"eval/wiki/loss": 3.5, "eval/wiki/perplexity": 33.0, "eval/books/loss": 4.5, "eval/piqa/acc": 0.5}, 20, 1)
    sink.log({"train/loss": 5.25}, 21, 2)
    sink._bar.refresh()
    assert "loss 5.2500, eval wiki loss 3.5000" in stream.getvalue() and "eval books" not in stream.getvalue()
    sink.log({"eval/loss": 5.5, "eval/wiki/loss": 3.25}, 30, 3)
    sink.close()
    last = stream.getvalue().split("\r")[-1]
    assert "eval loss 5.5000" in last and "wiki" not in last


def test_every_rank_has_its_log_file_and_rank_0_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        setup_logging(tmp_path, rank)
        logging.getLogger("moepp.training.trainer").info("info of %d", rank)
        logging.getLogger("moepp.training.trainer").warning("warning of %d", rank)
    logging.getLogger("moepp.training.trainer").info("file only", extra={"to_console": False})
    assert capsys.readouterr().err.splitlines() == ["info of 0", "warning of 0", "rank 1: warning of 1"]
    rank_0, rank_1 = ((tmp_path / "log" / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert "INFO moepp.training.trainer: info of 0" in rank_0 and "of 1" not in rank_0
    assert "info of 1" in rank_1 and "file only" in rank_1


def test_log_folder_that_is_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*/log: what lies there is not a folder; remove it"):
        setup_logging(tmp_path, 0)

"""The records as a table that grows columns, and what happens when it cannot be written."""

from __future__ import annotations

import csv
import errno
import io
import os
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moepp.analysis.comparison import table_bytes
from moepp.config import MoEConfig
from moepp.config.schema import WandbConfig
from moepp.io import files
from moepp.metrics.csv import FILE, CsvSink
from moepp.metrics.jsonl import JsonlSink, read_records
from moepp.metrics.routing import RoutingSnapshot
from moepp.metrics.sinks import SinkGroup, open_sinks
from moepp.metrics.wandb import WandbSink
from tests.data_files import make_config


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / FILE).open(newline="") as stream:
        return list(csv.DictReader(stream))


def open_group(folder: Path, start_step: int = 0) -> SinkGroup:
    return SinkGroup([JsonlSink(folder / "metrics.jsonl", start_step), CsvSink(folder)])


def test_new_metrics_get_columns_and_old_rows_stay_in_them(tmp_path: Path) -> None:
    with open_group(tmp_path) as sinks:
        sinks.log({"train/loss": 4.5}, 1, 64)
        sinks.log({"eval/loss": 5.25}, 1, 64)
        sinks.log({"train/loss": float("nan"), "b": 2.0}, 2, 128)
        sinks.log({"train/loss": 4.0}, 3, 192)
    assert rows(tmp_path) == [
        {"step": "1", "tokens": "64", "train/loss": "4.5", "eval/loss": "", "b": ""},
        {"step": "1", "tokens": "64", "train/loss": "", "eval/loss": "5.25", "b": ""},
        {"step": "2", "tokens": "128", "train/loss": "", "eval/loss": "", "b": "2.0"},
        {"step": "3", "tokens": "192", "train/loss": "4.0", "eval/loss": "", "b": ""},
    ]
    with open_group(tmp_path, start_step=2) as sinks:  # a run that continues
        sinks.log({"train/loss": 3.5}, 3, 192)
        sinks.rewind(1, 0)
        sinks.log({"c": 1.0}, 2, 128)
    assert [(row["step"], row["train/loss"], row.get("c")) for row in rows(tmp_path)] == [
        ("1", "4.5", ""),
        ("1", "", ""),
        ("2", "", "1.0"),
    ]


def test_names_and_texts_in_tables_are_no_formulas(tmp_path: Path) -> None:
    evil = ['=HYPERLINK("http://evil","x")', "@SUM(1)", "+1+cmd|'/C calc'!A0", "-2+3", "\t=1", "\r=1", "\n=1", "＝1"]
    plain = ["a=b", "-1.5", "+2e3", "-inf", " =1", "", "'=1"]
    rest = [-1.5, 3, None, True]
    names = [*evil, *map(str, range(len(plain) + len(rest)))]
    values = [*evil, *plain, *rest]
    found = list(csv.reader(io.StringIO(table_bytes("t.csv", [dict(zip(names, values, strict=True))]).decode(), "")))
    assert found[0] == [*(f"'{name}" for name in evil), *names[len(evil) :]]
    assert found[1] == [*(f"'{text}" for text in evil), *plain, "-1.5", "3", "", "True"]
    with open_group(tmp_path) as sinks:
        sinks.log({"=cmd": -1.5, "train/loss": 2.0}, 1, 10)
    assert rows(tmp_path) == [{"step": "1", "tokens": "10", "'=cmd": "-1.5", "train/loss": "2.0"}]


def test_a_run_that_goes_on_without_a_table_leaves_none_that_ends_early(tmp_path: Path) -> None:
    with open_group(tmp_path) as sinks:
        for step in (1, 2, 3):
            sinks.log({"a": float(step)}, step, 64 * step)
    cfg = make_config(["data/demo"])
    cfg = replace(cfg, logging=replace(cfg.logging, csv=False, wandb=replace(cfg.logging.wandb, mode="disabled")))
    (tmp_path / "metrics.until-step-2.csv").write_text("of a start before\n")
    with open_sinks(tmp_path, cfg, start_step=2) as sinks:
        sinks.log({"a": 3.5}, 3, 192)
    assert not (tmp_path / FILE).exists()
    with (tmp_path / "metrics.until-step-2.csv").open(newline="") as stream:
        assert [row["a"] for row in csv.DictReader(stream)] == ["1.0", "2.0"]
    with open_group(tmp_path, start_step=3) as sinks:  # and with one again, it is whole
        sinks.log({"a": 4.0}, 4, 256)
    assert [row["a"] for row in rows(tmp_path)] == ["1.0", "2.0", "3.5", "4.0"]


def test_a_table_that_cannot_be_written_is_reported_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_group(tmp_path) as sinks:
        sinks.log({"a": 1.0}, 1, 1)
        (tmp_path / FILE).unlink()
        (tmp_path / FILE).mkdir()
        for step in (2, 3):
            sinks.log({"a": float(step)}, step, step)
    message, last = caplog.messages
    assert message.startswith(f"{tmp_path}/{FILE} is not written now, but later anew: ")
    assert last == f"{tmp_path}/{FILE} lacks rows; the next start, and metrics.jsonl, have them"
    assert [record["a"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_rows_are_whole_on_a_disk_that_is_full_for_some_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The limit on the size of files stands for the disk; metrics.jsonl has room all the time."""
    sizes: list[int] = []
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    open_append, write_whole = files.open_append, files.write_whole
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited(write: Any, path: Path, *rest: Any) -> Any:
        is_table = path.name == FILE
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] if is_table and sizes else usual[0], usual[1]))
        return write(path, *rest)

    monkeypatch.setattr(files, "open_append", lambda *of: limited(open_append, *of))
    monkeypatch.setattr(files, "write_whole", lambda *of: limited(write_whole, *of))
    try:
        with open_group(tmp_path) as sinks:
            sinks.log({"a": 1.25, "b": 10.0}, 1, 10)
            sizes.append((tmp_path / FILE).stat().st_size + 10)
            for step in (2, 3, 4):
                sinks.log({"a": 1.25, "b": 10.0 * step}, step, 10 * step)
                resource.setrlimit(resource.RLIMIT_FSIZE, usual)
                assert [row["step"] for row in rows(tmp_path)] == ["1"]
                assert all(None not in row.values() and None not in row for row in rows(tmp_path))
            sizes.append(usual[0])
            sinks.log({"a": 1.25, "b": 50.0}, 5, 50)
            assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3", "4", "5"]
            sinks.log({"a": 1.25, "b": 60.0}, 6, 60)
            (tmp_path / FILE).unlink()
            sinks.log({"a": 1.25, "b": 70.0}, 7, 70)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, previous)
    assert [float(row["b"]) for row in rows(tmp_path)] == [10, 20, 30, 40, 50, 60, 70]
    [message] = caplog.messages
    assert "the file is larger than allowed" in message or "File too large" in message


def test_the_table_is_whole_at_the_end_where_the_disk_was_full_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, write_records, is_full = os.write, JsonlSink._write, True

    def wait(sink: JsonlSink) -> None:
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_records(sink)

    def full(descriptor: int, data: Any) -> int:
        if is_full and "metrics.csv" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with open_group(tmp_path) as sinks:
        monkeypatch.setattr(os, "write", full)
        for step in range(1, 12):
            sinks.log({f"a{step}": 1.0}, step, step)
            monkeypatch.setattr(JsonlSink, "_write", wait)  # from now on both wait
        is_full = False
    assert len(rows(tmp_path)) == 11 and len(rows(tmp_path)[0]) == 13


def test_no_row_is_lost_while_records_wait_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = JsonlSink._write
    with open_group(tmp_path) as sinks:
        sinks.log({"a": 1.0}, 1, 1)
        monkeypatch.setattr(JsonlSink, "_write", lambda sink: None)
        sinks.log({"a": 2.0}, 2, 2)
        sinks.log({"a": 3.0, "new": 1.0}, 3, 3)
        monkeypatch.setattr(JsonlSink, "_write", write)
        sinks.log({"a": 4.0}, 4, 4)
    assert [(row["a"], row["new"]) for row in rows(tmp_path)] == [("1.0", ""), ("2.0", ""), ("3.0", "1.0"), ("4.0", "")]


def test_wandb_gets_images_of_the_routing_beside_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[dict[str, Any], int]] = []
    run = SimpleNamespace(
        log=lambda row, step: logged.append((row, step)), define_metric=lambda *_, **__: None, finish=lambda: None
    )
    fake = SimpleNamespace(
        init=lambda **_: run, Settings=dict, teardown=lambda: None, Image=lambda image: ("image", image.shape)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    kinds = MoEConfig(num_ffn_experts=2, ffn_hidden_size=4).expert_counts
    snapshot = RoutingSnapshot(7, 70, (0,), kinds, np.array([[0.25, 0.75]]), {}, {})
    sink = WandbSink(tmp_path, WandbConfig(), "n", {}, is_resumed=False)
    sinks = SinkGroup([sink])
    sinks.log_routing(snapshot)  # nobody draws
    sink.draw = lambda found: {"routing/load": np.zeros((4, found.share_LE.shape[1], 3), np.uint8)}
    sinks.log_routing(snapshot)
    sinks.close()
    assert logged == [({"step": 7, "tokens": 70, "routing/load": ("image", (4, 2, 3))}, 7)]

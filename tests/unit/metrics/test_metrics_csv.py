"""The records as a table that grows columns, and what happens when it cannot be written."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moepp.config import MoEConfig
from moepp.config.schema import WandbConfig
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
    [message] = caplog.messages
    assert message.startswith("CsvSink failed at step 2 and gets no more records") and FILE in message
    assert [record["a"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]


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

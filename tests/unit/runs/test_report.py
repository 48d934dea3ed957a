"""The closing summary: what it says about given records, and its files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from moepp.cli import report as command
from moepp.errors import RunError
from moepp.runs.directory import RunDir
from moepp.runs.report import ReportInputs, read_inputs, report_files, summary_text

INPUTS = ReportInputs(6.5, ("The people of\nthe states", "We must", "Peace"))


def train_record(step: int, loss: float, sent: float = 250.0, vanilla: float = 400.0) -> dict[str, Any]:
    record: dict[str, Any] = {"step": step, "tokens": step * 512, "train/loss": loss}
    record |= {"routing/ffn_per_token": 1.4375, "routing/drop_fraction": 0.0125}
    record |= {"throughput/tokens_per_second": 4321.0}
    record |= {"comm/dispatch_bytes": sent, "comm/dispatch_bytes_vanilla": vanilla}
    for layer, shares in {2: (0.7, 0.15, 0.1, 0.05), 10: (0.4, 0.3, 0.2, 0.1)}.items():
        for kind, share in zip(("ffn", "constant", "copy", "zero"), shares, strict=True):
            record[f"routing/layer_{layer}/share_{kind}"] = share
    record["routing/layer_2/max_over_mean"] = 1.625
    return record


RECORDS = [
    train_record(10, 8.0),
    train_record(20, 7.0),
    {"step": 20, "tokens": 10240, "eval/loss": 6.75},
    train_record(25, 6.0, sent=1000.0, vanilla=2000.0),
    {"step": 25, "tokens": 12800, "eval/loss": 5.25},
]


def summary(records: list[dict[str, Any]], inputs: ReportInputs = INPUTS) -> str:
    return summary_text(records, inputs, RunDir(Path("runs/demo")))


def test_loss_is_held_against_the_unigram_entropy() -> None:
    text = summary(RECORDS)
    assert "25 optimizer steps, 12,800 tokens, 4,321 tokens/s" in text
    assert "validation loss: 5.2500 nats per token at step 25" in text
    assert "PASS: the validation loss is 1.2500 below the unigram entropy" in text
    short = summary(RECORDS[:3])
    assert "REMARK: the validation loss is 0.2500 above" in short and "after only 10,240 tokens" in short
    long = [record | {"tokens": record["tokens"] * 100} for record in RECORDS[:3]]
    assert "FAIL: the validation loss is 0.2500 above" in summary(long)


def test_table_has_a_row_of_shares_per_layer_in_order() -> None:
    rows = [line.split() for line in summary(RECORDS).splitlines() if line.startswith("|")]
    cells = [[cell for cell in row if cell != "|"] for row in rows]
    assert cells[2] == ["2", "70.0", "15.0", "10.0", "5.0", "1.62"]
    assert cells[3] == ["10", "40.0", "30.0", "20.0", "10.0", "-"]
    assert "FFN experts per token: 1.438; dropped assignments: 1.25%" in summary(RECORDS)


def test_brief_routing_has_a_row_of_the_mean_of_all_layers() -> None:
    record = {name: value for name, value in train_record(10, 8.0).items() if "layer_" not in name}
    shares = {"ffn": 0.55, "constant": 0.2, "copy": 0.15, "zero": 0.1}
    record |= {f"routing/share_{kind}": share for kind, share in shares.items()} | {"routing/max_over_mean": 1.25}
    header, _, row = [line for line in summary([record]).splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.split("|")[1:3]] == ["layer", "ffn %"]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["mean of all", "55.0", "20.0", "15.0", "10.0", "1.25"]


def test_bytes_are_means_over_all_steps() -> None:
    # (20 steps x 250 + 5 x 1000) / 25 = 400 and (20 x 400 + 5 x 2000) / 25 = 720
    text = summary(RECORDS)
    assert "over all ranks and the whole run: 400 B" in text
    assert "would send 720 B (44.4% saved)" in text


def test_run_that_starts_late_does_not_weigh_its_first_record_by_all_earlier_steps() -> None:
    records = [train_record(1010, 3.0, 100.0, 200.0), train_record(1020, 3.0, 300.0, 400.0)]
    assert "whole run: 200 B" in summary(records)


def test_samples_and_places_are_listed() -> None:
    text = summary(RECORDS)
    assert "1.\n\n> The people of\n> the states" in text and "3.\n\n> Peace" in text
    for name in ("summary.md", "loss.png", "metrics.jsonl", "config.yaml", "environment.json", "checkpoints"):
        assert f"`runs/demo/{name}`" in text


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([train_record(10, 8.0, 0.0, 0.0)], "Nothing was sent: every expert is local"),
        ([{"step": 1, "tokens": 2, "train/loss": 3.0}], "No communication metrics"),
        ([{"step": 1, "tokens": 2, "train/loss": 3.0}], "No routing metrics"),
        ([{"step": 1, "tokens": 2, "train/loss": 3.0}], "validation loss: not measured"),
        ([{"step": 1, "tokens": 2, "eval/loss": None, "train/loss": None}], "validation loss: not measured"),
        (
            [{"step": 1, "tokens": 2, "eval/wiki/loss": 3.25}],
            "## Loss\n\n- validation loss of wiki: 3.2500 nats per token\n\n",
        ),
    ],
)
def test_missing_metrics_are_said_to_be_missing(records: list[dict[str, Any]], said: str) -> None:
    assert said in summary(records, ReportInputs())
    assert "None were drawn" in summary(records, ReportInputs())


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return RunDir(tmp_path)


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_report_is_written_and_can_be_drawn_again_by_the_command(
    run_dir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    contents, _ = report_files(run_dir, INPUTS)
    (run_dir.path / "report.json").write_text(str(contents["report.json"]))
    assert read_inputs(run_dir) == INPUTS

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(run_dir.path)])) == 0
    out = capsys.readouterr().out
    assert "PASS: the validation loss is 1.2500 below" in out
    assert (run_dir.path / "summary.md").read_text() in out
    assert is_picture(run_dir.path / "loss.png") and read_inputs(run_dir) == INPUTS
    assert command.run(parser.parse_args([str(run_dir.path), "--unigram-entropy", "5.0"])) == 0
    out = capsys.readouterr().out
    assert "REMARK: the validation loss is 0.2500 above" in out and "> Peace" in out


def test_picture_shows_all_losses_and_the_entropy(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: dict[str, list[Any]] = {}

    def save(self: Figure, *_: object, **__: object) -> None:
        for line in self.axes[0].get_lines():
            points: Any = line.get_xydata()
            drawn[str(line.get_label())] = [tuple(point) for point in points.tolist()]

    monkeypatch.setattr(Figure, "savefig", save)
    with run_dir.metrics_file.open("a") as file:
        file.write('{"step": 25, "tokens": 12800, "eval/wiki/loss": 3.5}\n')
    report_files(run_dir, INPUTS)
    assert drawn["validation, wiki"] == [(12800, 3.5)]
    assert drawn["training"] == [(5120, 8.0), (10240, 7.0), (12800, 6.0)]
    assert drawn["validation"] == [(10240, 6.75), (12800, 5.25)]
    assert [y for _, y in drawn["unigram entropy"]] == [6.5, 6.5]


def test_run_without_records_and_folders_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="name the directory of a run"):
        command.run(
            argparse.Namespace(runs=[str(tmp_path / "none")], unigram_entropy=None, out=None, sort=None, table=None)
        )
    with pytest.raises(RunError, match="cannot read"):
        report_files(RunDir(tmp_path), INPUTS)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="holds no record yet"):
        report_files(RunDir(tmp_path), INPUTS)


def test_damaged_inputs_of_an_earlier_report_are_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(RunError, match="remove it"):
        read_inputs(RunDir(tmp_path))

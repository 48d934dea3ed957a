"""`moepp analyze`: every question on a folder of weights, and what bad input says."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from moepp.analysis.figures import Figure
from moepp.analysis.model_pages import Findings, write_findings
from moepp.cli import analyze as command
from moepp.cli.main import main
from moepp.config import DataConfig
from moepp.errors import DataError
from tests.data_files import write_indexed, write_word_tokenizer
from tests.official_cases import released_config, released_tensors, write_released
from tests.run_files import make_run

FLAGS = {"vocab_size": 40, "pad_token_id": "absent", "num_experts": [8]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = released_config(**FLAGS)
    out = tmp_path_factory.mktemp("analyze")
    write_released(out / "model", config, released_tensors(config))
    write_word_tokenizer(out / "model/tokenizer.json", 38)
    drawn = np.random.default_rng(0).integers(0, 38, (4, 100))
    write_indexed(out / "text", drawn.tolist())
    write_indexed(out / "other", (drawn % 5).tolist())
    write_indexed(out / "large", [[45] * 100])
    return out


def leave_earlier_page(folder: Path, what: str) -> None:
    """Write a page of the same question with a table and a figure that the next one does not have."""
    findings = Findings("t", "l", {"gone": [{"a": 1}]}, [Figure("gone", "T", "C.", lambda axes, palette: None)])
    write_findings(findings, folder, what)
    assert (folder / "gone.parquet").exists() and (folder / "figures/gone.png").exists()


@pytest.mark.parametrize(
    ("what", "tables"),
    [
        ("tokens", {"types", "positions", "frequencies", "losses", "kinds", "gates", "text"}),
        ("communication", {"communication"}),
        ("long-context", {"long-context"}),
        ("robustness", {"robustness"}),
    ],
)
def test_every_question_writes_tables_and_a_page(place, tmp_path, capsys, what, tables):
    sources = ["--data", str(place / "text")] + (["--data", str(place / "other")] if what == "tokens" else [])
    options = ["--tokens", "96", "--seq-len", "16", "--out", str(tmp_path / "out"), "--device", "cpu"]
    leave_earlier_page(tmp_path / "out", what)
    assert main(["analyze", what, str(place / "model"), *sources, *options]) == 0
    assert {path.stem for path in (tmp_path / "out").glob("*.parquet")} == tables
    page = (tmp_path / "out/report.html").read_text()
    assert "<script" not in page and "read 96 tokens" in page
    assert page.count("<figure>") == len(list((tmp_path / "out/figures").glob("*.png"))) > 0
    assert f"page: {tmp_path}/out/report.html" in capsys.readouterr().out
    if what == "robustness":
        rows = pq.read_table(tmp_path / "out/robustness.parquet").to_pylist()
        assert {row["model"] for row in rows} == {"model"}
    if what == "tokens":
        rows = pq.read_table(tmp_path / "out/kinds.parquet").to_pylist()
        assert {row["source"] for row in rows} == {"text", "other"}
        assert all(
            sum(v for k, v in row.items() if k not in ("source", "layer", "tokens")) == pytest.approx(1) for row in rows
        )
        types = pq.read_table(tmp_path / "out/types.parquet").to_pylist()
        assert types[0]["text"] == f"w{types[0]['token']}" and types[0]["examples"][0].endswith(types[0]["text"])
        assert 'class="text-sample"' in page and "FFN experts" in page


def test_a_model_without_zero_computation_experts_is_named_before_any_is_read(place, tmp_path, capsys, monkeypatch):
    find_model = command.find_model

    def find(source: str):
        found = find_model(source)
        if source.endswith("/../model"):
            no_kinds = {"num_zero_experts": 0, "num_copy_experts": 0, "num_constant_experts": 0}
            found = replace(found, cfg=replace(found.cfg, moe=replace(found.cfg.moe, **no_kinds)))
        return found

    monkeypatch.setattr(command, "find_model", find)
    monkeypatch.setattr(command, "_open", None)  # nothing is read
    models = [str(place / "model"), f"{place}/model/../model"]
    assert main(["analyze", "robustness", *models, "--data", str(place / "text"), "--out", str(tmp_path / "o")]) == 2
    assert "model has no zero-computation experts, so nothing can be swapped" in capsys.readouterr().err


def test_a_page_of_something_else_and_a_run_are_never_written_over(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_open", None)  # nothing is read
    arguments = ["analyze", "tokens", str(place / "model"), "--data", str(place / "text"), "--out"]
    run = make_run(tmp_path, "run")
    for name, text in (
        ("mine", "<p>mine</p>"),
        ("other", '<meta name="generator" content="moepp analyze robustness">'),
        ("report", '<meta name="generator" content="moepp report">'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.html").write_text(text)
        assert main([*arguments, str(tmp_path / name)]) == 2
        assert "report.html was not written by moepp analyze tokens" in capsys.readouterr().err
        assert [(path.name, path.read_text()) for path in (tmp_path / name).iterdir()] == [("report.html", text)]
    before = sorted(path.name for path in run.iterdir())
    assert main([*arguments, str(run)]) == 2
    assert "is the directory of a run" in capsys.readouterr().err
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokens", "model", "model", "--out", "o"], "reads one model, and 2 were named"),
        (["robustness", "model", "model", "--data", "text", "--out", "o", "--seq-len", "16"], "named more than once"),
        (["tokens", "model", "--data", "text"], "is no run, so there is no place for the tables; give --out"),
        (["tokens", "model", "--out", "o"], "names no data; give --data PREFIX"),
        (["tokens", "model", "--data", "text", "--out", "o", "--seq-len", "500"], "fewer than one sequence of 500 + 1"),
        (
            ["tokens", "model", "--data", "large", "--out", "o", "--seq-len", "16"],
            "beyond the model's vocabulary of 40",
        ),
        (["tokens", "model", "--data", "text", "--out", "o", "--tokens", "1"], "--tokens=1 is below its minimum 2"),
        (["traffic", "model"], "invalid choice: 'traffic'"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_written(place, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(place)
    try:
        code = main(["analyze", *arguments])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (place / "o").exists()


def test_named_sets_are_read_whole_where_the_data_have_no_validation_part(place):
    ours, other = str(place / "text"), str(place / "other")
    data = DataConfig((ours,), 8, split="1,0,0", validation={"a": (ours,), "b": (other, ours)})
    found: Any = SimpleNamespace(run_config=SimpleNamespace(data=data), cfg=SimpleNamespace(vocab_size=40))
    assert command._prefixes(argparse.Namespace(data=None), found) == [ours, other]
    assert len(command._sequences(ours, found, 8, 24)) == 3
    found.run_config.data = replace(data, validation={"b": (other,)})
    with pytest.raises(DataError, match=r"text has 0 validation tokens.*; name other data with --data PREFIX"):
        command._sequences(ours, found, 8, 24)

"""What `moepp plan` takes: everything that train.py does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from moepp.cli import plan
from moepp.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/parallelism.md").read_text()

# Ranks and experiment of each row of the page's table that names a layout.
ROWS = {
    "1 GPU, 24 GB": (1, "moepp_0.6b"),
    "8 GPUs, 80 GB": (8, "moepp_2b"),
    "4 × 8 GPUs": (32, "moepp_7b"),
    "8 × 8 GPUs and more": (128, "moepp_7b"),
}
OPTIONS = ["--ranks", "1", "engine=native", "data.tokenizer=null", "train.samples=0"]


@pytest.mark.parametrize("form", ["data.validation.wiki=[data/x]", "data.validation={wiki: [data/x]}"])
def test_keys_that_no_file_names_are_taken_as_in_training(form, capsys):
    assert main(["plan", *OPTIONS, form]) == 0
    assert "1 ranks" in capsys.readouterr().out


def test_own_configuration_files_are_found(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    text = "defaults: [tiny, _self_]\nnum_layers: 3\n"
    (tmp_path / "model/mine.yaml").write_text(text)
    assert main(["plan", "--config-dir", str(tmp_path), *OPTIONS, "model=mine"]) == 0
    assert " 3  " in capsys.readouterr().out
    assert main(["plan", *OPTIONS, "model=mine"]) == 2
    assert "found below --config-dir FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-dir", "missing", "train.steps=1"], "--config-dir missing is not a folder"),
        (["train.steps"], "write"),
        (["data.validation.wiki=data/x"], "give a list, for example data.validation.wiki=[data/x]"),
        (["data.validation=data/x"], "for example data.validation={wiki: [data/wiki/text]}"),
        (["train.steps=1,2"], "add -m to sweep over them"),
    ],
)
def test_bad_input_is_said_in_one_line(arguments, message, capsys):
    assert main(["plan", *arguments[:-1], *OPTIONS, arguments[-1]]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_the_examples_work(capsys):
    shown = re.findall(r"`(moepp plan [^`]+)`", PAGE + (ROOT / "README.md").read_text())
    assert len(shown) == 2
    for line in {plan.EXAMPLE, *shown}:
        assert main(shlex.split(line)[1:]) == 0, line
    assert "64 ranks = pipeline 8 x data 8" in capsys.readouterr().out


@pytest.mark.parametrize("cluster", ROWS)
def test_layouts_that_the_page_recommends_are_allowed(cluster, capsys):
    [cells] = re.findall(rf"^\| {re.escape(cluster)} \|([^|]+)\|([^|]+)\|$", PAGE, re.MULTILINE)
    [layout] = re.findall(r"`([^`]+)`", cells[1])
    ranks, experiment = ROWS[cluster]
    assert main(["plan", "--ranks", str(ranks), f"experiment={experiment}", *layout.split()]) == 0
    assert f"{ranks} ranks = " in capsys.readouterr().out

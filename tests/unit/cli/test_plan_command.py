"""What `moepp plan` takes: everything that train.py does."""

from __future__ import annotations

import pytest

from moepp.cli.main import main

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

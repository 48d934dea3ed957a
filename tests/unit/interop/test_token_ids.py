"""Special tokens of folders of weights: lists as transformers writes them, and whether attention crosses documents."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from moepp.checkpoint import read_info
from moepp.cli import import_
from moepp.cli.main import main
from moepp.errors import CheckpointError
from moepp.evaluation.load import build_model, document_remarks, eod_of_folder, find_model
from moepp.interop import hf, official
from moepp.interop.hf.config import hf_config, read_hf
from moepp.interop.official.config import read_released
from moepp.interop.token_ids import TokenIds
from moepp.model import Transformer, init_parameters
from tests.data_files import make_config, write_word_tokenizer
from tests.evaluation_cases import one_process, tiny_config
from tests.official_cases import GOLDEN, released_config

FORMATS = {
    "official": (lambda: released_config(), lambda folder: read_released(folder)[1]),
    "moepp": (
        lambda: hf_config(tiny_config(), TokenIds(), "float32"),
        lambda folder: read_hf(folder)[1],
    ),
}
WORDS = 5  # w0 to w4, <unk> 5, <|endoftext|> 6


def write_config(folder: Path, form: str, **ids: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(FORMATS[form][0]() | ids))
    return folder


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["bos", "eos", "pad"])
@pytest.mark.parametrize(("value", "expected"), [(3, 3), ([3], 3), ([3, 3], 3), ([], None), (None, None)], ids=str)
def test_one_token_or_none_in_any_spelling(tmp_path: Path, form: str, name: str, value: Any, expected: Any) -> None:
    write_config(tmp_path, form, **{f"{name}_token_id": value})
    assert getattr(FORMATS[form][1](tmp_path), name) == expected
    if name == "eos":
        assert eod_of_folder(tmp_path) == expected


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", ["3", True, 3.0, {}, [3, "4"], [[3]], [None], [True]], ids=str)
def test_what_is_no_token_is_refused(tmp_path: Path, form: str, value: Any) -> None:
    for name in ("bos", "eos", "pad"):
        write_config(tmp_path, form, **{f"{name}_token_id": value})
        with pytest.raises(CheckpointError, match=rf"{name}_token_id=.* is no token id") as error:
            FORMATS[form][1](tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("eos_token", "expected"), [("w3", 3), ({"content": "<|endoftext|>"}, 6), ("w2", None), (None, None), (7, None)]
)
def test_of_several_ends_the_tokenizers_own_counts(tmp_path: Path, form: str, eos_token: Any, expected: Any) -> None:
    write_config(tmp_path, form, eos_token_id=[1, 3, 6])
    write_word_tokenizer(tmp_path / "tokenizer.json", WORDS)
    assert FORMATS[form][1](tmp_path).eos is eod_of_folder(tmp_path) is None, "no file names one"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    assert FORMATS[form][1](tmp_path).eos == eod_of_folder(tmp_path) == expected


def test_the_end_is_found_in_every_kind_of_tokenizer(tmp_path: Path) -> None:
    write_config(tmp_path, "official", eos_token_id=[0, 2])
    settings = {"eos_token": "</s>", "added_tokens_decoder": {"0": {"content": "<pad>"}, "2": {"content": "</s>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_released(tmp_path)[1].eos == 2, "without a tokenizer.json"
    pieces = [["a", 0.0], ["b", -1.0], ["</s>", -2.0]]
    for model in ({"type": "Unigram", "vocab": pieces}, {"type": "BPE", "vocab": {"</s>": 2, "a": 0}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": model}))
        assert read_released(tmp_path)[1].eos == 2, model


def test_several_ends_are_said_where_they_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for source in (GOLDEN / "default").iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    tree = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": [0, 2]}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert official.load_pretrained(tmp_path).token_ids.eos is None
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("moepp")]
    assert "lists several end tokens (0, 2)" in message
    cfg, unknown = make_config(["x"]), import_._Ends(None, None)
    (remark,) = import_._remarks(str(tmp_path), cfg, unknown)
    assert "lists several end tokens (0, 2)" in remark
    assert import_._remarks(str(tmp_path), cfg, import_._Ends(2, None)) == []
    (remark,) = import_._remarks(str(tmp_path), cfg, import_._Ends(2, 2))
    assert "data.document_attention=false it crosses them" in remark
    within = replace(cfg, data=replace(cfg.data, document_attention=True))
    (remark,) = import_._remarks(str(tmp_path), within, import_._Ends(0, 2))
    assert "ends a text with token 0" in remark and "ended with token 2" in remark


@pytest.mark.parametrize("value", ["5", 272, -1, True, [5]], ids=str)
def test_an_end_of_documents_that_is_no_token_is_refused(tmp_path: Path, value: Any) -> None:
    write_config(tmp_path, "moepp", document_end_token_id=value)
    with pytest.raises(CheckpointError, match=r"document_end_token_id=.* is no token of the model"):
        hf.read_config(tmp_path)


@torch.no_grad()
def hidden(place: Path, ids_BS: torch.Tensor) -> torch.Tensor:
    with one_process() as groups:
        return build_model(find_model(str(place)), groups, "fp32")(ids_BS).hidden


def test_attention_within_documents_goes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a model to a folder, a run and exports: all compute the same where an end stands before text."""
    end = 5
    model = Transformer(tiny_config(), document_end=end)
    init_parameters(model, 3)
    folder, run, again = tmp_path / "folder", tmp_path / "run", tmp_path / "again"
    hf.save_pretrained(model, folder, TokenIds(7, 7, None))
    assert main(["import", str(folder), str(run), "train.precision=fp32"]) == 0
    out, err = capsys.readouterr()
    assert "data.document_attention=true" in shlex.split(out.splitlines()[-1])
    assert "ended with token 5" in err
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["document_attention"] is True
    assert read_info(run / "checkpoints" / "step-00000000").eod_id == end
    assert main(["export", str(run), str(again), "--format", "moepp"]) == 0
    assert capsys.readouterr().err == ""
    ids_BS = torch.tensor([[1, 2, 3, end, 8, 9, 4, end, 6]])
    for place in (folder, run, again):
        assert find_model(str(place)).document_end == end
        torch.testing.assert_close(hidden(place, ids_BS), model.eval()(ids_BS).hidden, rtol=0, atol=0)
    assert document_remarks(find_model(str(run))) == []
    (remark,) = document_remarks(replace(find_model(str(run)), document_end=None))  # of versions that did not keep it
    assert "here it crosses them" in remark
    assert main(["export", str(run), str(tmp_path / "released")]) == 0
    assert "which the released format cannot say" in capsys.readouterr().err
    assert not torch.allclose(hidden(tmp_path / "released", ids_BS), hidden(run, ids_BS), atol=1e-3), "the case is none"


@pytest.mark.parametrize(
    ("form", "end", "within", "said"),
    [
        ("moepp", 5, False, True),
        ("moepp", 5, True, False),
        ("moepp", None, False, False),
        ("official", 5, False, False),
    ],
)
def test_training_that_crosses_documents_from_here_on_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    form: str,
    end: int | None,
    within: bool,
    said: bool,
) -> None:
    from moepp.training import build

    write_config(tmp_path, "moepp", document_end_token_id=end)
    monkeypatch.setattr(build, "load_initial_weights", lambda *_: None)
    cfg = make_config(["x"], init__path=str(tmp_path), init__format=form, data__document_attention=within)
    for rank in (0, 1):
        build._start_from(cfg, None, SimpleNamespace(rank=rank))  # pyright: ignore[reportArgumentType]
    assert ["attention stayed within documents" in record.getMessage() for record in caplog.records] == [True] * said

"""What ``moepp prepare`` refuses, and how it says so."""

from __future__ import annotations

import errno
import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moepp.cli.main import main
from moepp.data.prepare.pipeline import PrepareOptions, prepare
from moepp.errors import DataError
from tests.data_files import write_word_tokenizer


def _parquet(path: Path, column: str, values: list[object]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({column: values}), path)


def _bytes(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.txt", lambda path: None, r"input .*a\.txt matches no file"),
        ("*.jsonl", lambda path: None, r"input .*\*\.jsonl matches no file"),
        ("folder", lambda path: path.mkdir(), "folder .* holds no file ending in .txt"),
        ("a.pdf", _bytes(b"w1"), r"a\.pdf does not end in .txt"),
        ("a.txt", _bytes(b"w1 \xff"), r"a\.txt is not UTF-8 \(byte 4\)"),
        ("a.txt", _bytes(b" \n \n"), "the input holds no text: 1 files, 1 empty documents"),
        ("a.jsonl", _bytes(b""), "the input holds no text: 1 files, 0 empty documents"),
        ("a.jsonl", _bytes(b'{"text": "w1"}\n{"text": '), r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", _bytes(b'{"text": "\xff"}'), r"a\.jsonl line 1 is not UTF-8"),
        ("a.jsonl", _bytes(b'{"text": "\\ud800"}'), "line 1: field 'text' holds half a surrogate pair"),
        ("a.jsonl", _bytes(b'["w1"]'), "line 1 is a JSON array; write one object a line"),
        ("a.jsonl", _bytes(b'{"body": "w1", "id": 3}'), r"line 1 has no field 'text' \(it has body, id\)"),
        ("a.jsonl", _bytes(b'{"text": 3}'), "line 1: field 'text' is a number, not a text"),
        ("a.jsonl.gz", _bytes(gzip.compress(b'{"text": "w1"}' * 9)[:-12]), r"a\.jsonl\.gz is not a whole gzip file"),
        ("a.txt.gz", _bytes(b"w1"), r"a\.txt\.gz is not a whole gzip file"),
        ("a.parquet", _bytes(b"PAR1 nothing"), r"a\.parquet is not a whole parquet file"),
        ("a.parquet", lambda path: _parquet(path, "body", ["w1"]), r"no column 'text' \(it has body\); name it"),
        ("a.parquet", lambda path: _parquet(path, "text", [1, 2]), "column 'text' is of type int64"),
        ("a.parquet", lambda path: _parquet(path, "text", ["w1", None]), "row 2: field 'text' is null"),
    ],
)
def test_unusable_input(tmp_path: Path, name: str, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path / name)
    options = PrepareOptions(str(tmp_path / "out"), write_word_tokenizer(tmp_path / "t.json"), progress=False)
    with pytest.raises(DataError, match=message) as caught:
        prepare([str(tmp_path / name)], options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".*"))


def _run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *extra: str, tokenizer: str | None = None) -> str:
    """Run the command on a good file; it must end with code 2 and one line, which is returned."""
    (tmp_path / "a.txt").write_text("w1 w2")
    path = tokenizer or write_word_tokenizer(tmp_path / "t.json")
    workers = () if "--workers" in extra else ("--workers", "1")
    code = main(["prepare", str(tmp_path / "a.txt"), "--tokenizer", path, *workers, "--no-progress", *extra])
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_unusable_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--output", str(tmp_path / "out"))
    assert "--output is missing" in _run(tmp_path, capsys)
    assert "--workers=0 is below 1" in _run(tmp_path, capsys, *out, "--workers", "0")
    assert "unrecognized arguments: --outptu" in _run(tmp_path, capsys, *out, "--outptu")
    assert "--demo always makes data/demo and takes no INPUT" in _run(tmp_path, capsys, "--demo")
    assert "tokenizer none.json does not exist" in _run(tmp_path, capsys, *out, tokenizer="none.json")
    assert "no end-of-document token (x)" in _run(tmp_path, capsys, *out, "--eod-token", "x")
    assert "below 257" in _run(tmp_path, capsys, *out, "--train-tokenizer", "99", tokenizer=str(tmp_path / "n.json"))
    assert "t.json exists" in _run(tmp_path, capsys, *out, "--train-tokenizer")
    assert "leave --train-tokenizer out" in _run(tmp_path, capsys, *out, "--append", "--train-tokenizer", "300")
    no_eod = write_word_tokenizer(tmp_path / "no_eod.json", eod=None)
    assert "has no end-of-document token" in _run(tmp_path, capsys, *out, tokenizer=no_eod)
    assert not list(tmp_path.glob("out*"))


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    error = _run(tmp_path, capsys, "--output", str(tmp_path / "file" / "out"))
    assert "cannot write" in error and "choose a folder you may write to" in error


@pytest.mark.parametrize("output", ["data/", "data/.", "..", "./"])
def test_output_that_names_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str) -> None:
    error = _run(tmp_path, capsys, "--output", f"{tmp_path}/{output}")
    assert f"--output {tmp_path}/{output} names a folder; name the files in it, as {tmp_path}/" in error
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "t.json"}


def test_places_that_no_file_can_take_are_found_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.idx").mkdir()
    train = ("--train-tokenizer", "300", "--overwrite")
    monkeypatch.setattr("moepp.data.prepare.pipeline.train_on_files", None)  # the work
    error = _run(tmp_path, capsys, "--output", f"{tmp_path}/out", *train, tokenizer=str(tmp_path / "folder"))
    assert f"cannot write {tmp_path}/folder: it is a folder" in error
    error = _run(tmp_path, capsys, "--output", f"{tmp_path}/x", *train, tokenizer=str(tmp_path / "n.json"))
    assert f"cannot write {tmp_path}/x.idx: it is a folder" in error
    with monkeypatch.context() as mounted:
        mounted.setattr("os.path.ismount", lambda path: path.endswith("n.json"))
        error = _run(tmp_path, capsys, "--output", f"{tmp_path}/out", *train, tokenizer=str(tmp_path / "n.json"))
    assert f"cannot write {tmp_path}/n.json: it is a mount point" in error


def test_what_is_read_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = write_word_tokenizer(tmp_path / "x.json")
    for extra in ((), ("--train-tokenizer", "300")):
        error = _run(tmp_path, capsys, "--output", f"{tmp_path}/x", "--overwrite", *extra, tokenizer=tokenizer)
        assert f"--tokenizer {tokenizer} is also what --output {tmp_path}/x writes" in error
    (tmp_path / "in.json").write_text('{"text": "w1"}')
    (tmp_path / "link").symlink_to(tmp_path)
    error = _run(tmp_path, capsys, f"{tmp_path}/in.json", "--output", f"{tmp_path}/link/in", "--overwrite")
    assert f"{tmp_path}/in.json is an input and would be replaced" in error
    assert (tmp_path / "in.json").read_text() == '{"text": "w1"}'


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "free space at"), (errno.EFBIG, "ulimit -f"), (errno.EDQUOT, "remove files")]
)
def test_failed_write_is_one_line_with_the_remedy_for_its_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", fail)
    error = _run(tmp_path, capsys, "--output", str(tmp_path / "out"))
    assert error.startswith(f"error: cannot write {tmp_path}/out: ") and remedy in error
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("argv", [["prepar"], ["Prepare"], ["preprae", "--help"]])
def test_unknown_command_names_the_near_one(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"unknown command '{argv[0]}'" in error and "prepare" in error


def test_overview_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["prepare", "Tokenise", "text", "files"] in [words[:4] for words in lines]
    assert main([]) == 2

"""``moepp prepare``: every input format, and output that is whole or absent."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepp.cli.main import main
from moepp.data.manifest import Manifest
from moepp.data.prepare import pipeline as engine
from moepp.data.prepare.encode import BATCHES_IN_FLIGHT_PER_WORKER, Batch, encode_documents
from moepp.data.prepare.inspect import verify
from moepp.data.prepare.pipeline import PrepareOptions, prepare
from moepp.data.prepare.readers import ReadOptions
from moepp.errors import DataError
from tests.data_files import write_word_tokenizer

EOD = 21  # of write_word_tokenizer's default
TEXTS = ["w1 w2 w3", "w4", "w5 nothing w6\nw7", "w8 <|endoftext|> w9"]
TOKENS = [[1, 2, 3], [4], [5, 20, 6, 7], [8, 20, 9]]  # 20 is <unk>: a spelled special token is text


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return write_word_tokenizer(tmp_path / "tokenizer.json")


@pytest.fixture
def run(tmp_path: Path, tokenizer: str) -> Callable[..., Manifest]:
    """Prepare inputs into tmp_path/out; the word tokenizer has no token for much of the text."""

    def run(*inputs: Path | str, **options: Any) -> Manifest:
        defaults = {"output": str(tmp_path / "out"), "tokenizer": tokenizer, "progress": False, "max_lost_share": 1.0}
        return prepare([str(path) for path in inputs], PrepareOptions(**(defaults | options)))

    return run


def _documents(prefix: Path | str) -> list[list[int]]:
    """What Megatron reads."""
    from moepp.data.megatron import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def _with_eod(tokens: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[*document, EOD] for document in tokens]


def _files(folder: Path, prefix: str = "out") -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith((prefix, "."))}


def _write_jsonl(path: Path, texts: Sequence[str]) -> None:
    content = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def _write_parquet(path: Path, texts: Sequence[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": range(len(texts)), "text": list(texts)})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def _write_folder(path: Path, texts: Sequence[str]) -> None:
    (path / "deeper").mkdir(parents=True)
    for i, text in enumerate(texts):
        name = f"{i}.txt.gz" if i % 2 else f"{i}.txt"
        content = text.encode()
        (path / name).write_bytes(gzip.compress(content) if i % 2 else content)
    (path / "deeper" / ".hidden.txt").write_text("w19")
    (path / "notes.md").write_text("w18")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", _write_jsonl),
        ("a.jsonl.gz", _write_jsonl),
        ("a.parquet", _write_parquet),
        ("folder", _write_folder),
    ],
)
def test_every_format_gives_the_documents_in_order(
    tmp_path: Path, run: Callable[..., Manifest], name: str, write: Callable[[Path, Sequence[str]], None]
) -> None:
    write(tmp_path / name, ["", *TEXTS, " \n"])
    manifest = run(tmp_path / name)
    assert _documents(tmp_path / "out") == _with_eod(TOKENS)
    assert (manifest.documents, manifest.tokens, manifest.eod_id) == (4, 15, EOD)
    assert (manifest.vocab_size, manifest.max_token_id, manifest.dtype) == (22, EOD, "uint16")
    assert manifest.sources[0]["empty_documents"] == 2
    assert verify(str(tmp_path / "out")) == manifest


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("file", [[1, 2, 3, 4, 5, 6]]),
        ("paragraph", [[1, 2, 3], [4], [5, 6]]),
        ("line", [[1, 2], [3], [4], [5], [6]]),
    ],
)
def test_units_of_plain_text(
    tmp_path: Path, run: Callable[..., Manifest], unit: str, expected: list[list[int]]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\n\nw1 w2\r\nw3\r\n\r\nw4\n \n\nw5\nw6")
    run(tmp_path / "a.txt", read=ReadOptions(text_unit=unit))
    assert _documents(tmp_path / "out") == _with_eod(expected)


def test_globs_folders_and_files_keep_the_given_order_once(tmp_path: Path, run: Callable[..., Manifest]) -> None:
    for i in (1, 2, 3, 10):
        (tmp_path / f"part-{i:02}.txt").write_text(f"w{i}")
    run(tmp_path / "part-03.txt", str(tmp_path / "part-*.txt"))
    assert _documents(tmp_path / "out") == _with_eod([[3], [1], [2], [10]])


def test_other_text_field(tmp_path: Path, run: Callable[..., Manifest]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w1", "body": "w2"}\n\n{"text": "w3", "body": "w4"}')
    run(tmp_path / "a.jsonl", read=ReadOptions(text_fields=("body",)))
    assert _documents(tmp_path / "out") == _with_eod([[2], [4]])


def test_truncation_and_padding_of_the_tokenizer_are_off(tmp_path: Path, run: Callable[..., Manifest]) -> None:
    cutting = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    filling = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "w0",
    }
    path = write_word_tokenizer(tmp_path / "cut.json", truncation=cutting, padding=filling)
    _write_jsonl(tmp_path / "a.jsonl", TEXTS)
    run(tmp_path / "a.jsonl", tokenizer=path)
    assert _documents(tmp_path / "out") == _with_eod(TOKENS)


def test_large_vocabulary_takes_four_bytes(tmp_path: Path, run: Callable[..., Manifest]) -> None:
    path = write_word_tokenizer(tmp_path / "large.json", num_words=70_000)
    (tmp_path / "a.txt").write_text("w69999 w3")
    assert run(tmp_path / "a.txt", tokenizer=path).dtype == "int32"
    assert _documents(tmp_path / "out") == [[69_999, 3, 70_001]]


def test_processes_do_not_change_a_byte(
    tmp_path: Path, run: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BATCH_CHARACTERS", 40)  # many batches
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 20, size=rng.integers(1, 30))) for _ in range(200)]
    _write_jsonl(tmp_path / "a.jsonl", texts)
    serial = run(tmp_path / "a.jsonl", output=str(tmp_path / "serial"))
    parallel = run(tmp_path / "a.jsonl", output=str(tmp_path / "parallel"), workers=3)
    assert serial == parallel
    assert _documents(tmp_path / "serial") == _with_eod([[int(w[1:]) for w in text.split()] for text in texts])


def test_reading_never_runs_far_ahead_of_writing(tokenizer: str) -> None:
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield Batch(["w1 w2"], [0], 5)

    results = encode_documents(endless(), (Path(tokenizer).read_text(), EOD, "uint16", tokenizer), workers=2)
    for done in range(1, 20):
        encoded, _ = next(results)
        assert encoded.documents[0].tolist() == [1, 2, EOD]
        assert taken < done + 2 * BATCHES_IN_FLIGHT_PER_WORKER + 1
    results.close()


def test_append_equals_preparing_at_once(tmp_path: Path, run: Callable[..., Manifest]) -> None:
    for i, texts in enumerate((TEXTS[:1], TEXTS[1:3], TEXTS[3:])):
        _write_jsonl(tmp_path / f"{i}.jsonl", texts)
    run(*(tmp_path / f"{i}.jsonl" for i in range(3)))
    for i in range(3):
        parts = run(tmp_path / f"{i}.jsonl", output=str(tmp_path / "parts"), append=i > 0)
    assert _documents(tmp_path / "parts") == _with_eod(TOKENS)
    whole = verify(str(tmp_path / "out"))
    assert verify(str(tmp_path / "parts")) == parts
    assert (parts.bin_sha256, parts.idx_sha256) == (whole.bin_sha256, whole.idx_sha256)
    assert (parts.documents, parts.tokens, parts.max_token_id) == (whole.documents, whole.tokens, whole.max_token_id)
    assert [source["documents"] for source in parts.sources] == [1, 2, 1]


def test_append_opens_no_data_that_their_owner_has_closed(tmp_path: Path, run: Callable[..., Manifest]) -> None:
    _write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for append in (False, True):
        run(tmp_path / "a.jsonl", append=append)
        found = [path for path in tmp_path.iterdir() if path.name.startswith("out.")]
        assert len(found) == 3 and all(path.stat().st_mode & 0o077 == 0 for path in found) == append
        for path in found:
            path.chmod(0o600)


def test_output_is_kept_unless_told_otherwise(tmp_path: Path, run: Callable[..., Manifest]) -> None:
    _write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match=r"--append: there is no .*out\.bin/\.idx"):
        run(tmp_path / "a.jsonl", append=True)
    before = run(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"out\.bin exists; .* --append or --overwrite"):
        run(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="give one of them"):
        run(tmp_path / "a.jsonl", append=True, overwrite=True)
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        run(tmp_path / "a.jsonl", append=True, tokenizer=write_word_tokenizer(tmp_path / "t.json", 21))
    assert verify(str(tmp_path / "out")) == before
    _write_jsonl(tmp_path / "a.jsonl", TEXTS[:1])
    run(tmp_path / "a.jsonl", overwrite=True)
    assert _documents(tmp_path / "out") == _with_eod(TOKENS[:1])
    Path(tmp_path / "out.json").unlink()
    with pytest.raises(DataError, match=r"out\.json is missing"):
        run(tmp_path / "a.jsonl", append=True)


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"append": True}])
def test_failure_midway_leaves_what_was_there(
    tmp_path: Path, run: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    before = None
    if options:
        _write_jsonl(tmp_path / "a.jsonl", TEXTS)
        before = run(tmp_path / "a.jsonl")
    monkeypatch.setattr(engine, "BATCH_CHARACTERS", 1)  # the first documents are written before the last is read
    _write_jsonl(tmp_path / "b.jsonl", TEXTS)
    with (tmp_path / "b.jsonl").open("a") as stream:
        stream.write("{broken")
    with pytest.raises(DataError, match=r"b\.jsonl line 5 is not JSON"):
        run(tmp_path / "b.jsonl", **options)
    if before is None:
        assert _files(tmp_path) == set()
    else:
        assert _files(tmp_path) == {"out.bin", "out.idx", "out.json"}
        assert verify(str(tmp_path / "out")) == before


def test_command_tells_what_it_leaves_out(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.JSONL").write_text('{"text": "w1"}\n{"text": null}\n{"body": "w2 w3"}\n{"text": ""}\n')
    (tmp_path / "in" / "notes.md").write_text("w4")
    given = ["--output", str(tmp_path / "out"), "--tokenizer", tokenizer, "--workers", "1", "--no-progress"]
    command = ["prepare", str(tmp_path / "in"), *given]
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert main([*command, "--text-field", "text,body", "--max-bad-lines", "1"]) == 0
    captured = capsys.readouterr()
    assert "2 documents (1 empty documents left out), 5 tokens" in captured.out
    notes = captured.err.splitlines()
    assert all(note.startswith("note: ") for note in notes)
    for expected in ("left out 1 of another kind", "notes.md", "left out 1 bad lines", "line 2: field 'text' is null"):
        assert any(expected in note for note in notes), expected
    assert "note: documents by text field: 'text' 2, 'body' 1" in notes
    (tmp_path / "b.jsonl").write_text('{"text": "w5"}')
    assert main(["prepare", str(tmp_path / "b.jsonl"), *given, "--append"]) == 0
    assert "stays as it is" in capsys.readouterr().err

"""PREFIX.json as somebody may have edited, damaged or replaced it: refused in one line before any work."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepp.data.indexed import open_indexed
from moepp.data.manifest import read_manifest
from moepp.data.prepare.inspect import unigram_entropy
from moepp.data.prepare.pipeline import PrepareOptions, prepare
from moepp.errors import DataError
from moepp.training.rank_facts import file_facts
from tests.data_files import make_config, write_indexed, write_word_tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix of two documents, prepared in two calls: 3 + 2 tokens with their ends, vocabulary 22."""
    folder = tmp_path_factory.mktemp("good")
    tokenizer = write_word_tokenizer(folder / "t.json")
    for i, text in enumerate(("w1 w2", "w3")):
        (folder / f"{i}.txt").write_text(text)
        options = PrepareOptions(str(folder / "x"), tokenizer, append=i > 0, progress=False)
        prepare([str(folder / f"{i}.txt")], options)
    return folder / "x"


def refused(prefix: Path, content: bytes) -> str:
    """What is said of the content, through whatever reads a manifest."""
    path = Path(f"{prefix}.json")
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        with pytest.raises(DataError) as caught:
            open_indexed(str(prefix))
        with pytest.raises(DataError):
            open_indexed(str(prefix), interrupted_append=True)  # as --append does, before it reads any text
    finally:
        path.write_bytes(before)
    message = str(caught.value)
    assert str(path) in message and "again" in message and "\n" not in message and len(message) < 600
    return message


def test_what_prepare_writes_is_read_back(good: Path) -> None:
    manifest = open_indexed(str(good)).manifest
    assert manifest is not None and (manifest.documents, manifest.tokens, manifest.max_token_id) == (2, 5, 21)
    assert len(manifest.sources) == 2 and manifest.to_json() == Path(f"{good}.json").read_text()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[" * 100_000, "is not valid JSON: more than 100 values inside one another"),
        (b'{"tokens": NaN}', "is not valid JSON: NaN is no JSON number"),
        (b"{\xff}", "is not valid JSON"),
        (b"[]", "it holds no object"),
        (b"{}", "its keys are not documents, tokens,"),
    ],
)
def test_what_is_no_manifest_is_refused(good: Path, content: bytes, told: str) -> None:
    assert told in refused(good, content)


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree.update(values)


def change_source(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree["sources"][0].update(values)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (change(extra=1), "its keys are not"),
        (lambda tree: tree.pop("eod_id"), "its keys are not"),
        (change(sources=["x"]), "a source is 'x'"),
        (change(sources=[{}]), "documents of a source is None"),
        (change(sources=[]), "sources is no list"),
        (change(sources={"a": 1}), "sources is no list"),
        (change_source(files=None), "a file of a source is None"),
        (change_source(files=["a.txt"]), "a file of a source is 'a.txt'"),
        (change_source(files=[{"path": "a", "bytes": -1}]), "bytes of a file is -1"),
        (change_source(tokens=True), "tokens of a source is True"),
        (change_source(documents=2), "documents is 2, and its sources have 3"),
        (change(documents=1), "documents is 1, and its sources have 2"),
        (change(documents=10**30), "documents is 10"),
        (change(documents=2.0), "documents is 2.0"),
        (change(tokens=6), "6 tokens of uint16 are not 10 bytes"),
        (change(dtype="int64"), "dtype is 'int64'"),
        (change(dtype=["uint16"]), "dtype is ['uint16']"),
        (change(eod_id=-5), "eod_id is -5"),
        (change(eod_id=10**9), "eod_id 1000000000, max_token_id 21 and vocab_size 22 do not go up"),
        (change(max_token_id=3), "eod_id 21, max_token_id 3 and vocab_size 22 do not go up"),
        (change(max_token_id=22), "max_token_id 22 and vocab_size 22 do not go up"),
        (change(vocab_size=10**6), "vocab_size 1000000 is more than uint16 can tell apart"),
        (change(bin_sha256="0" * 63), "bin_sha256 is '000"),
        (change(tokenizer_file=7), "tokenizer_file is 7"),
        (change(tokenizer_sha256="\x1b[2J"), "tokenizer_sha256 is '\\x1b[2J'"),
    ],
)
def test_a_field_that_cannot_be_is_named(good: Path, edit: Callable[[dict[str, Any]], Any], told: str) -> None:
    tree = json.loads(Path(f"{good}.json").read_text())
    edit(tree)
    assert told in refused(good, json.dumps(tree).encode())


def test_a_manifest_of_another_index_is_refused(good: Path, tmp_path: Path) -> None:
    """Sizes agree; what the index holds does not."""
    prefix = write_indexed(tmp_path / "y", [[1, 21], [2, 3, 21]])
    tree = json.loads(Path(f"{good}.json").read_text())
    for edit in ({}, {"documents": 1, "tokens": 5}):
        other = copy.deepcopy(tree) | edit
        other["sources"] = [other["sources"][0] | {"documents": other["documents"], "tokens": 5}]
        Path(f"{prefix}.json").write_text(json.dumps(other))
        if edit:
            with pytest.raises(DataError, match=r"tells of 1 documents with 5 tokens of uint16, and .* of 2 with 5"):
                open_indexed(prefix)
        else:
            assert open_indexed(prefix).manifest is not None


def test_entropy_of_ids_that_the_manifest_does_not_tell_of_is_refused(good: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{good}{suffix}", tmp_path / f"x{suffix}")
    tokens_T = np.memmap(tmp_path / "x.bin", np.uint16, "r+")
    tokens_T[1] = 22
    tokens_T.flush()
    with pytest.raises(DataError, match=r"x\.bin holds token ids from 1 to 22, and 0 to 21 are known; it is damaged"):
        unigram_entropy(str(tmp_path / "x"))


def test_what_lies_there_and_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    assert read_manifest(str(tmp_path / "x")) is None
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(DataError, match="it is not a regular file"):
        read_manifest(str(tmp_path / "x"))
    os.symlink("nowhere", tmp_path / "y.json")
    with pytest.raises(DataError, match="No such file"):
        read_manifest(str(tmp_path / "y"))


def test_a_damaged_note_of_an_interrupted_preparation_is_refused(good: Path, tmp_path: Path) -> None:
    for content in ("[" * 5000, "{}", '{"files": 3, "last": "a"}', '{"files": [{"path": 1, "inode": 2}], "last": "a"}'):
        (tmp_path / ".x.preparing").mkdir(mode=0o700, exist_ok=True)
        (tmp_path / ".x.preparing/publishing.json").write_text(content)
        with pytest.raises(DataError, match=rf"publishing\.json is not .*; remove {tmp_path}/\.x\.preparing"):
            prepare([str(good.parent / "0.txt")], PrepareOptions(str(tmp_path / "x"), str(good.parent / "t.json")))


def test_ranks_compare_the_files_of_validation_sets_too(good: Path, tmp_path: Path) -> None:
    other = write_indexed(tmp_path / "wiki", [[1, 2, 3]] * 4)
    cfg = make_config([str(good)], data__validation={"wiki": [other], "both": [str(good), other]})
    before = file_facts(cfg)
    assert set(before) == {f"{good}.idx", f"{good}.bin", f"{good}.json", f"{other}.idx", f"{other}.bin"}
    write_indexed(tmp_path / "wiki", [[1, 2, 4]] * 4)
    after = file_facts(cfg)
    assert {path for path in before if before[path] != after[path]} == {f"{other}.bin"}

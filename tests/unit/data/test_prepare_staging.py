"""``moepp prepare`` puts its files in place whole or not at all, whenever it is killed and wherever they lie."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from moepp.data.indexed import open_indexed
from moepp.data.manifest import Manifest
from moepp.data.prepare import pipeline as engine
from moepp.data.prepare import staging
from moepp.data.prepare.inspect import verify
from moepp.data.prepare.pipeline import PrepareOptions, prepare
from moepp.errors import DataError, WriteError
from tests.data_files import write_word_tokenizer

TEXTS = ["w1 w2 w3", "w4", "w5 nothing w6\nw7", "w8 <|endoftext|> w9"]
TOKENS = [1, 2, 3, 21, 4, 21, 5, 20, 6, 7, 21, 8, 20, 9, 21]  # 20 is <unk>, 21 ends documents


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Manifest]:
    """Prepare inputs into tmp_path/out; the word tokenizer has no token for much of the text."""
    tokenizer = write_word_tokenizer(tmp_path / "tokenizer.json")

    def run(*inputs: Path | str, **options: Any) -> Manifest:
        defaults = {"output": str(tmp_path / "out"), "tokenizer": tokenizer, "progress": False, "max_lost_share": 1.0}
        return prepare([str(path) for path in inputs], PrepareOptions(**(defaults | options)))

    return run


def _write_jsonl(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(("out", "."))}


def _run_and_die(run: Callable[[], Any], renames_before_death: int) -> None:
    """In a forked child: run, and die like a killed process at the given rename."""
    child = os.fork()
    if child == 0:
        count, replace = 0, os.replace

        def replace_or_die(source: str, target: str) -> None:
            nonlocal count
            if ".preparing" in str(target):  # not yet under a final name
                return replace(source, target)
            if count == renames_before_death:
                os._exit(0)
            count += 1
            replace(source, target)

        os.replace = replace_or_die
        run()
        os._exit(1)  # not reached: it died
    assert os.waitpid(child, 0)[1] == 0


OTHER_TOKENS_SAME_SIZE = ["w9 w8 w7", "w6"]  # as TEXTS[:2], so that only the content tells them apart


@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({}, TEXTS[2:]),
        ({"overwrite": True}, TEXTS[2:]),
        ({"overwrite": True}, OTHER_TOKENS_SAME_SIZE),
        ({"append": True}, TEXTS[2:]),
    ],
    ids=["new", "overwrite", "overwrite_same_size", "append"],
)
def test_killed_run_leaves_nothing_that_looks_whole_and_can_be_repeated(
    tmp_path: Path, run: Callable[..., Manifest], options: dict[str, bool], texts: list[str], renames: int
) -> None:
    _write_jsonl(tmp_path / "a.jsonl", TEXTS[:2])
    _write_jsonl(tmp_path / "b.jsonl", texts)
    expected = run(tmp_path / "b.jsonl", output=str(tmp_path / "expected"))
    before = run(tmp_path / "a.jsonl") if options else None
    _run_and_die(lambda: run(tmp_path / "b.jsonl", **options), renames)
    try:
        left = open_indexed(str(tmp_path / "out"))
    except DataError:
        left = None
    if renames > 0 or "overwrite" in options or before is None:
        assert left is None
    else:
        assert left is not None and left.manifest == before == verify(str(tmp_path / "out"))
    again = run(tmp_path / "b.jsonl", **options)
    assert again == verify(str(tmp_path / "out"))
    assert _files(tmp_path) == {"out.bin", "out.idx", "out.json"}
    if "append" in options:
        assert open_indexed(str(tmp_path / "out")).tokens_T().tolist() == TOKENS
        assert len(again.sources) == 2
    else:
        assert again == expected


def test_two_runs_cannot_write_one_output(tmp_path: Path, run: Callable[..., Manifest]) -> None:
    _write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / ".out.preparing").mkdir()
    lock = os.open(tmp_path / ".out.preparing", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is preparing"):
        run(tmp_path / "a.jsonl")
    os.close(lock)
    run(tmp_path / "a.jsonl")


def _kill_at(moment: str, run: Callable[[], Any], patch: pytest.MonkeyPatch) -> None:
    """In a forked child: run, and die like a killed process when a function of the engine is called."""
    child = os.fork()
    if child == 0:
        patch.setattr(engine, moment, lambda *_, **__: os._exit(0))
        run()
        os._exit(1)  # not reached: it died
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("moment", ["_tokenizer", "_write", "_require_text", "_manifest", "publish"])
def test_a_run_killed_before_it_publishes_can_be_repeated(
    tmp_path: Path, run: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    _write_jsonl(tmp_path / "a.jsonl", TEXTS)
    options: dict[str, Any] = {"train_vocab": 300, "tokenizer": str(tmp_path / "trained.json")}
    _kill_at(moment, lambda: run(tmp_path / "a.jsonl", **options), monkeypatch)
    assert _files(tmp_path) == {".out.preparing"} and not (tmp_path / "trained.json").exists()
    assert run(tmp_path / "a.jsonl", **options) == verify(str(tmp_path / "out"))
    assert _files(tmp_path) == {"out.bin", "out.idx", "out.json"}


@pytest.mark.parametrize("renames", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("place", ["trained.json", "elsewhere/trained.json"])
def test_a_run_killed_while_it_publishes_with_its_tokenizer_can_be_repeated(
    tmp_path: Path, run: Callable[..., Manifest], renames: int, place: str
) -> None:
    _write_jsonl(tmp_path / "a.jsonl", TEXTS)
    options: dict[str, Any] = {"train_vocab": 300, "tokenizer": str(tmp_path / place)}
    if renames < 4:
        _run_and_die(lambda: run(tmp_path / "a.jsonl", **options), renames)
        assert (tmp_path / place).exists() == (renames > 0)
        assert run(tmp_path / "a.jsonl", **options).tokenizer_file == "trained.json"
    else:
        run(tmp_path / "a.jsonl", **options)
        with pytest.raises(DataError, match=r"out\.bin exists"):  # whole: kept
            run(tmp_path / "a.jsonl", **options)
    assert _files(tmp_path) == {"out.bin", "out.idx", "out.json"}
    assert [path.name for path in (tmp_path / place).parent.glob("*trained.json*")] == ["trained.json"]


def test_the_tokenizer_may_lie_on_another_file_system(
    tmp_path: Path, run: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is renamed from folder to folder; and where the other one fails, what was there stays whole."""
    replace, write = os.replace, staging.write_whole

    def within_a_folder(source: str, target: str) -> None:
        if os.path.dirname(source) != os.path.dirname(target) and "trained.json" in str(target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source)
        replace(source, target)

    def full(path: str, data: bytes | str, mode: int = 0o644) -> None:
        write(path, data, mode)
        if "trained.json" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def busy(source: str, target: str) -> None:
        if str(target).endswith("trained.json"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", within_a_folder)
    _write_jsonl(tmp_path / "a.jsonl", TEXTS)
    other = tmp_path / "elsewhere"
    options: dict[str, Any] = {"train_vocab": 300, "tokenizer": str(other / "trained.json")}
    before = run(tmp_path / "a.jsonl", **options)
    trained = (other / "trained.json").read_bytes()
    _write_jsonl(tmp_path / "b.jsonl", ["another text"] * 20)
    for module, name, fault in ((staging, "write_whole", full), (os, "replace", busy)):
        with monkeypatch.context() as broken:
            broken.setattr(module, name, fault)
            with pytest.raises(WriteError, match=r"cannot write .*/elsewhere/trained\.json: "):
                run(tmp_path / "b.jsonl", overwrite=True, **options)
        assert verify(str(tmp_path / "out")) == before and (other / "trained.json").read_bytes() == trained
    after = run(tmp_path / "b.jsonl", overwrite=True, **options)
    assert verify(str(tmp_path / "out")) == after != before
    assert [path.name for path in other.iterdir()] == ["trained.json"]


def test_files_of_others_are_not_taken_for_those_of_a_killed_run(tmp_path: Path, run: Callable[..., Manifest]) -> None:
    _write_jsonl(tmp_path / "a.jsonl", TEXTS)
    _run_and_die(lambda: run(tmp_path / "a.jsonl"), 1)
    (tmp_path / "other").write_text("mine")
    os.replace(tmp_path / "other", tmp_path / "out.bin")
    with pytest.raises(DataError, match=r"out\.bin exists"):
        run(tmp_path / "a.jsonl")
    assert (tmp_path / "out.bin").read_text() == "mine"


def test_a_planted_link_is_not_emptied(tmp_path: Path, run: Callable[..., Manifest]) -> None:
    _write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "important").write_text("")
    (tmp_path / ".out.preparing").symlink_to(tmp_path / "mine")
    with pytest.raises(DataError, match="cannot write"):
        run(tmp_path / "a.jsonl")
    assert (tmp_path / "mine" / "important").exists()

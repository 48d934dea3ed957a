"""Which files ``moepp prepare`` reads, and that it names those it does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moepp.data.prepare import inputs
from moepp.data.prepare.inputs import find_inputs
from moepp.data.prepare.readers import DocumentReader, ReadOptions
from moepp.errors import DataError


def _names(root: Path, *entries: object) -> list[str]:
    found = find_inputs([str(entry) for entry in entries or (root,)])
    return [os.path.relpath(file.path, root) for file in found.files]


def _write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    _write(tmp_path, "tree/real/x.jsonl", "elsewhere/part2/y.jsonl", "elsewhere/z.txt")
    (tmp_path / "tree/part2").symlink_to(tmp_path / "elsewhere/part2")
    (tmp_path / "tree/z.txt").symlink_to(tmp_path / "elsewhere/z.txt")
    assert _names(tmp_path / "tree") == ["part2/y.jsonl", "real/x.jsonl", "z.txt"]


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    _write(tmp_path, "tree/a/x.txt", "other/y.txt")
    for name, target in (("up", ".."), ("self", "."), ("a/top", "/"), ("a/round", "../a"), ("a/out", "../../other")):
        (tmp_path / "tree" / name).symlink_to(target)
    (tmp_path / "other/back").symlink_to(tmp_path / "tree/a")
    found = find_inputs([str(tmp_path / "tree")])
    assert [os.path.relpath(file.path, tmp_path) for file in found.files] == ["tree/a/out/y.txt", "tree/a/x.txt"]
    assert len(found.left_out[inputs.AGAIN]) == 5


@pytest.mark.parametrize("name", ["w.JSONL", "w.Json.GZ", "w.TXT", "w.json", "w.Parquet", "w.TXT.gz"])
def test_suffixes_count_in_any_case(tmp_path: Path, name: str) -> None:
    _write(tmp_path, name)
    assert _names(tmp_path) == [name] == _names(tmp_path, tmp_path / name)


def test_everything_left_out_is_counted_and_named(tmp_path: Path) -> None:
    _write(tmp_path, "a.txt", "b.md", "c.csv", "d/e.pdf", "d/f", ".hidden.txt", ".git/config.txt")
    os.link(tmp_path / "a.txt", tmp_path / "same.txt")
    (tmp_path / "again.txt").symlink_to("a.txt")
    (tmp_path / "nowhere").symlink_to("none")
    os.mkfifo(tmp_path / "pipe.txt")
    found = find_inputs([str(tmp_path)])
    assert [os.path.basename(file.path) for file in found.files] == ["a.txt"]
    remarks = {remark.replace(f"{tmp_path}/", "") for remark in found.remarks()}
    assert remarks == {
        "left out 4 of another kind: b.md, c.csv, d/e.pdf, ...",
        "left out 2 hidden: .git, .hidden.txt",
        "left out 2 a link to what is read already: again.txt, same.txt",
        "left out 1 a link to nothing: nowhere",
        "left out 1 not a regular file: pipe.txt",
    }


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    _write(tmp_path, "a.txt", "\x1b[31mred\nline.md")
    (remark,) = find_inputs([str(tmp_path)]).remarks()
    assert "\x1b" not in remark and "\n" not in remark and r"\x1b[31mred line.md" in remark
    with pytest.raises(DataError) as caught:
        find_inputs([str(tmp_path / "\x1b[31mred\nline.md")])
    assert "\x1b" not in str(caught.value)


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, *(f"{folder}/{name}.txt" for folder in "cab" for name in "zxy"))
    (tmp_path / "link").symlink_to("a")
    expected = _names(tmp_path)
    assert expected == sorted(expected) and len(expected) == 9
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listdir(folder)[::-1])
    assert _names(tmp_path) == expected


def test_globs_search_the_folders_that_they_match(tmp_path: Path) -> None:
    _write(tmp_path, "c/1/a.txt", "c/2/b.jsonl", "c/3.txt")
    assert _names(tmp_path, tmp_path / "c/*") == ["c/1/a.txt", "c/2/b.jsonl", "c/3.txt"]
    assert _names(tmp_path, tmp_path / "c/3.txt", tmp_path / "c") == ["c/3.txt", "c/1/a.txt", "c/2/b.jsonl"]
    assert _names(tmp_path, tmp_path / "c", tmp_path / "c/3.txt") == ["c/1/a.txt", "c/2/b.jsonl", "c/3.txt"]


def test_refused_inputs_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(*entries: object) -> str:
        with pytest.raises(DataError) as caught:
            _names(tmp_path, *entries)
        return str(caught.value)

    _write(tmp_path, "kinds/a.md", "kinds/b.csv", "broken/a.txt", "locked/in/a.txt", "good/a.txt")
    (tmp_path / "empty/deeper").mkdir(parents=True)
    (tmp_path / "broken/b.txt").symlink_to("none")
    os.mkfifo(tmp_path / "pipe.txt")
    assert "holds no file ending in .txt" in refusal(tmp_path / "empty")
    assert "left out 2 of another kind" in refusal(tmp_path / "kinds")
    assert "b.txt is a link to nothing" in refusal(tmp_path / "broken")
    assert "pipe.txt is not a regular file" in refusal(tmp_path / "pipe.txt")
    assert "matches no file" in refusal(tmp_path / "good/*.jsonl")
    listdir = os.listdir

    def deny(folder: str) -> list[str]:
        if folder.endswith("locked/in"):
            raise PermissionError(13, "Permission denied")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", deny)
    assert "cannot read folder" in (message := refusal(tmp_path / "locked")) and "Permission denied" in message
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot read" in (message := refusal(tmp_path / "good")) and "Permission denied" in message


def test_files_that_vanish_or_change_meanwhile_end_the_work(tmp_path: Path) -> None:
    _write(tmp_path, "a.txt", "b.txt")
    files = find_inputs([str(tmp_path)]).files
    reader = DocumentReader(ReadOptions())
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: No such file or directory; it was removed meanwhile"):
        list(reader.read(files[0]))
    (tmp_path / "b.txt").write_text("longer than before")
    with pytest.raises(DataError, match=r"b\.txt changed while the input was read"):
        list(reader.read(files[1]))


def test_a_file_that_grows_while_it_is_read_ends_the_work(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (file,) = find_inputs([str(tmp_path)]).files
    documents = DocumentReader(ReadOptions(text_unit="line")).read(file)
    assert next(documents).text == "one"
    with (tmp_path / "a.txt").open("a") as stream:
        stream.write("three\n")
    with pytest.raises(DataError, match="changed while"):
        list(documents)

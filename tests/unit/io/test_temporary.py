"""A system without a folder for temporary files: what needs none goes on, the rest ends in one line."""

from __future__ import annotations

import errno
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

from moepp.cli.main import main
from moepp.data.tokenizer import Tokenizer
from moepp.errors import DataError, WriteError
from moepp.io.temporary import temporary_folder, unnamed_file
from moepp.ops.cpu.cache import CacheError, find_cache
from tests.data_files import write_word_tokenizer
from tests.official_cases import GOLDEN

ROOT = Path(__file__).resolve().parents[3]


def _nowhere(*_: Any, **__: Any) -> NoReturn:
    raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TemporaryFile", "TemporaryDirectory", "gettempdir", "mkdtemp"):
        monkeypatch.setattr(tempfile, name, _nowhere)


def test_a_folder_is_removed_at_the_end() -> None:
    with temporary_folder() as folder:
        (folder / "file").touch()
    assert not folder.exists()


def test_without_a_place_for_folders_one_line_says_so(nowhere: None) -> None:
    told = "cannot write temporary files: No usable temporary directory .*; set TMPDIR to a folder"
    with pytest.raises(WriteError, match=told), temporary_folder():
        pass


@pytest.mark.parametrize("has_memory", [True, False])
def test_files_without_a_name_need_no_folder_where_there_is_memory(
    nowhere: None, monkeypatch: pytest.MonkeyPatch, has_memory: bool
) -> None:
    if not has_memory:
        monkeypatch.delattr(os, "memfd_create")
    stream = unnamed_file()
    assert (stream is not None) == has_memory
    if stream is not None:
        with stream:
            stream.write(b"text")
            stream.seek(0)
            assert stream.read() == b"text"


@pytest.mark.parametrize("has_memory", [True, False])
def test_tokenizers_are_loaded_without_a_place(
    nowhere: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_memory: bool
) -> None:
    if not has_memory:
        monkeypatch.delattr(os, "memfd_create")
    assert Tokenizer(write_word_tokenizer(tmp_path / "t.json")).encode("w1 w2") == [1, 2]
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        Tokenizer(str(tmp_path / "bad.json"))


def test_kernels_are_kept_in_the_users_folder_without_a_place(
    nowhere: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_cache().folder == tmp_path / "moepp"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CacheError, match="no folder to keep them in"):
        find_cache()


def test_an_import_says_so_in_one_line(nowhere: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(GOLDEN / "published_flags"), str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: cannot write temporary files: ") and "TMPDIR" in err and err.count("\n") == 1


def test_the_launcher_goes_on_without_exit_codes(
    nowhere: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("launcher", ROOT / "launch/torchrun.py")
    assert spec is not None and spec.loader is not None
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    monkeypatch.setenv("MOEPP_EXIT_CODES", "/of/another/launcher")
    monkeypatch.setattr("sys.argv", ["torchrun.py", "train.py"])
    monkeypatch.setattr(launcher, "run", lambda args: None)
    assert launcher.main() == 0 and "MOEPP_EXIT_CODES" not in os.environ
    monkeypatch.setattr(launcher, "run", _nowhere)  # torchrun's own logs
    assert launcher.main() == 2
    err = capsys.readouterr().err
    assert err.startswith("[torchrun] error: FileNotFoundError: ") and "set TMPDIR to a folder" in err

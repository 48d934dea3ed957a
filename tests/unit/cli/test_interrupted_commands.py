"""Exports and imports that are interrupted or meet a full disk: the old or the new one, whole, and a way to go on."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moepp.checkpoint import format as fmt
from moepp.checkpoint import saver
from moepp.cli import export
from moepp.cli.main import main
from moepp.errors import RunError
from moepp.interop.weights import TensorFolder
from moepp.interop.weights import write as weights_write
from moepp.runs.directory import RunDir
from tests.data_files import write_word_tokenizer
from tests.official_cases import GOLDEN
from tests.small_disk import small_disk

RELEASED = GOLDEN / "published_flags"


class Killed(BaseException):
    """What no handler of errors catches, like the end of the process."""


def killed(*_: object, **__: object) -> None:
    raise Killed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(RELEASED, folder / "released")
    write_word_tokenizer(folder / "released" / "tokenizer.json", 100)
    assert main(["import", str(folder / "released"), str(folder / "run"), "train.precision=fp32"]) == 0
    return str(folder / "run")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def error_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# --- export

INTERRUPTIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "configuration": lambda patch: patch.setattr(weights_write, "write_json", killed),
    "weights": lambda patch: patch.setattr("safetensors.torch.save_file", killed),
    "tokenizer": lambda patch: patch.setattr(export, "_write_tokenizer", killed),
    "card": lambda patch: patch.setattr(export, "model_card", killed),
    "syncing": lambda patch: patch.setattr("moepp.io.files.sync_tree", killed),
}


@pytest.mark.parametrize("where", INTERRUPTIONS)
@pytest.mark.parametrize("form", ["official", "moepp"])
def test_interrupted_export_leaves_the_earlier_one_or_nothing(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, form: str
) -> None:
    out = tmp_path / "out"
    for before in ({}, None):  # nothing there; an earlier export
        if before is None:
            assert main(["export", run, str(out), "--dtype", "bf16"]) == 0
            before = content(tmp_path)
        with monkeypatch.context() as patch:
            INTERRUPTIONS[where](patch)
            if where == "configuration":
                for module in ("moepp.interop.hf.save", "moepp.interop.official.save"):
                    patch.setattr(f"{module}.write_json", killed)
            with pytest.raises(Killed):
                main(["export", run, str(out), "--format", form])
        assert content(tmp_path) == before
    assert main(["export", run, str(out), "--format", form]) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_export_replaces_what_exports_write_and_keeps_the_rest(run: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", run, str(out), "--format", "moepp", "--max-shard-size", "0.3MB"]) == 0
    (out / "modeling_moe_plus_plus.py").write_text("copied here, as the command says")
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref")
    (out / "link").symlink_to("nowhere")
    out.chmod(0o750)
    assert main(["export", run, str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert {"modeling_moe_plus_plus.py", ".git", "link", "model.safetensors", "tokenizer.json"} <= names
    assert not any("-of-" in name or name.endswith("_moepp.py") or "index" in name for name in names)
    assert (out / ".git" / "HEAD").read_text() == "ref" and os.readlink(out / "link") == "nowhere"
    assert (out / "modeling_moe_plus_plus.py").read_text() == "copied here, as the command says"
    assert out.stat().st_mode & 0o777 == 0o750


def test_export_over_a_link_or_the_working_directory_is_refused(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "aim").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "aim")
    assert "a symbolic link lies there" in error_line(["export", run, str(tmp_path / "link")], capsys)
    monkeypatch.chdir(tmp_path / "aim")
    assert "is the working directory" in error_line(["export", run, "."], capsys)
    assert content(tmp_path) == {}


@pytest.fixture(name="small_disk")
def mounted_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB: less than the weights."""
    with small_disk(tmp_path / "disk", "256k") as folder:
        yield folder


def test_full_disk_is_named_by_export_and_import_and_both_can_be_repeated(
    run: str, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["export", run, str(small_disk / "out")], ["import", str(RELEASED), str(small_disk / "run")]):
        error = error_line(arguments, capsys)
        assert "the disk is full" in error and f"free space at {small_disk}" in error and "permission" not in error
    assert not (small_disk / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert main(["export", run, str(small_disk / "out")]) == 0
    assert main(["import", str(RELEASED), str(small_disk / "run")]) == 0


def test_full_disk_under_an_export_is_named_without_a_small_disk(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert main(["export", run, str(tmp_path / "out")]) == 0
    before = content(tmp_path)
    for call in ("os.write", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(call, full)
            error = error_line(["export", run, str(tmp_path / "out"), "--dtype", "bf16"], capsys)
        assert f"cannot write {tmp_path}/out: the disk is full" in error
    assert content(tmp_path) == before


# --- import


@pytest.mark.parametrize("where", ["write_tensors", "write_manifest", "_rename", "finish_import"])
def test_interrupted_import_can_be_repeated_and_is_never_taken_for_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    arguments = ["import", str(RELEASED), str(tmp_path / "run"), "train.precision=fp32"]
    with monkeypatch.context() as patch:
        if where == "finish_import":
            patch.setattr("moepp.runs.directory.RunClaim.finish_import", killed)
        else:
            patch.setattr(fmt if where == "write_manifest" else saver, where, killed)
        with pytest.raises(Killed):
            main(arguments)
    for resume in ("auto", "never"):  # what train.py asks for
        with pytest.raises(RunError, match="holds an import that was not finished; repeat that `moepp import`"):
            RunDir.claim(tmp_path / "run", {}, {}, resume)
    assert main(arguments) == 0
    assert not (tmp_path / "run" / ".importing").exists()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    one, other = TensorFolder(tmp_path / "out"), TensorFolder(RELEASED)
    assert all(torch.equal(one.read(key), other.read(key)) for key in other.shapes)
    assert fmt.verify(tmp_path / "run" / "checkpoints" / "step-00000000") == []
    assert "already holds a run" in error_line(arguments, capsys)

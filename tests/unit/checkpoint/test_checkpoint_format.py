"""What counts as a whole checkpoint, and that reading one executes nothing."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from moepp.checkpoint import format as fmt
from moepp.checkpoint import list_checkpoints, verify
from moepp.checkpoint.storage import TensorReader
from moepp.errors import CheckpointError

WEIGHT = torch.arange(12.0).reshape(3, 4)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint, its tensors written by DCP itself."""
    folder = tmp_path_factory.mktemp("whole") / "step-00000010"
    folder.mkdir()
    save({"w/fp32": WEIGHT, "w/step": torch.ones(1)}, storage_writer=FileSystemWriter(folder), no_dist=True)
    (folder / fmt.INFO).write_text('{"step": 10}')
    sign(folder)
    return folder


@pytest.fixture
def checkpoint(template: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints" / "step-00000010"
    folder.mkdir(parents=True)
    for file in template.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def sign(folder: Path) -> None:
    """A manifest that fits what is in the folder, as somebody could write who has tampered with it."""
    files = {file.name: fmt.checksum(file) for file in folder.iterdir() if file.name != fmt.MANIFEST}
    fmt.write_manifest(folder, files)


def flip(file: Path, position: float, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[int(position * (len(data) - 1))] ^= 1 << bit
    file.write_bytes(data)


def test_whole_checkpoint_has_no_problems(checkpoint: Path) -> None:
    assert verify(checkpoint) == [] == verify(checkpoint, from_disk=True)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["format"] == "moepp-checkpoint-1"
    assert manifest["files"]["info.json"]["size"] == len('{"step": 10}')


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "info.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "flipped", "longer"])
def test_damage_of_any_file_is_found_and_named(checkpoint: Path, name: str, damage: str) -> None:
    file = checkpoint / name
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        flip(file, 0.5)
    else:
        file.write_bytes({"truncated": whole[:-2], "empty": b"", "longer": whole + b"\0"}[damage])
    problems = verify(checkpoint)
    if name == "manifest.json" and damage == "flipped":
        assert problems  # of the manifest, or of the file whose entry was hit
    else:
        assert len(problems) == 1 and name in problems[0]


@pytest.mark.parametrize("position", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_anywhere_is_found(checkpoint: Path, position: float, bit: int) -> None:
    flip(checkpoint / "__0_0.distcp", position, bit)
    assert verify(checkpoint) == ["__0_0.distcp: content changed (SHA-256 differs)"]


def test_ranks_together_check_every_file(checkpoint: Path) -> None:
    for name in (".metadata", "__0_0.distcp", "info.json"):
        original = (checkpoint / name).read_bytes()
        flip(checkpoint / name, 0.5)
        found = [problem for rank in range(2) for problem in verify(checkpoint, (rank, 2))]
        assert len(found) == 1 and name in found[0]
        (checkpoint / name).write_bytes(original)


@pytest.mark.parametrize("name", ["../other", "/etc/hostname", "a/b"])
def test_manifest_cannot_point_outside(checkpoint: Path, name: str) -> None:
    tree = json.loads((checkpoint / "manifest.json").read_text())
    tree["files"][name] = {"size": 1, "sha256": "0"}
    (checkpoint / "manifest.json").write_text(json.dumps(tree))
    assert "outside the checkpoint" in verify(checkpoint)[0]


def test_manifest_must_list_what_a_checkpoint_consists_of(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()
    sign(checkpoint)
    assert verify(checkpoint) == ["manifest.json lists no info.json or no .metadata"]


def test_checkpoint_of_another_version_and_no_checkpoint_at_all(checkpoint: Path, tmp_path: Path) -> None:
    tree = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(tree | {"format": "moepp-checkpoint-9"}))
    assert "has format 'moepp-checkpoint-9', expected 'moepp-checkpoint-1'" in verify(checkpoint)[0]
    assert "is not a folder" in verify(tmp_path / "nothing")[0]


def test_only_whole_names_are_listed_in_order(tmp_path: Path) -> None:
    for name in ("step-00000020", "step-00000003", ".step-00000030.tmp", "step-00000040.replaced-1", "step-5", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000050").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000020"]
    assert [path.name for path in fmt.list_archived(tmp_path)] == ["step-00000040.replaced-1"]
    assert list_checkpoints(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("keep", "keep_every", "gone"),
    [(0, 0, []), (1, 0, [1, 2, 3, 4]), (2, 0, [1, 2, 3]), (1, 2, [1, 3]), (9, 0, []), (1, 1, [])],
)
def test_prunable(tmp_path: Path, keep: int, keep_every: int, gone: list[int]) -> None:
    for step in range(1, 6):
        (tmp_path / fmt.checkpoint_name(step)).mkdir()
    assert [fmt.step_of(path) for path in fmt.prunable(tmp_path, keep, keep_every)] == gone


def test_interrupted_removal_shows_no_half_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree = fmt.shutil.rmtree

    def interrupted(path: Path, **kwargs: Any) -> None:
        (path / "info.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(fmt.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fmt.remove(checkpoint)
    monkeypatch.setattr(fmt.shutil, "rmtree", rmtree)
    assert list_checkpoints(checkpoint.parent) == []
    fmt.remove_remains(checkpoint.parent)
    assert list(checkpoint.parent.iterdir()) == []


# --- reading


def test_reader_fills_any_subset_in_any_dtype(checkpoint: Path) -> None:
    reader = TensorReader(checkpoint)
    assert reader.shapes == {"w/fp32": (3, 4), "w/step": (1,)}
    target = torch.zeros(3, 4, dtype=torch.bfloat16)
    reader.fill({"w/fp32": target})
    assert torch.equal(target, WEIGHT.bfloat16())


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


def read_all(checkpoint: Path) -> None:
    reader = TensorReader(checkpoint)
    reader.fill({key: torch.empty(shape) for key, shape in reader.shapes.items()})


def replace_index(checkpoint: Path, change: Callable[[Any], Any]) -> None:
    file = checkpoint / ".metadata"
    file.write_bytes(pickle.dumps(change(pickle.loads(file.read_bytes()))))
    sign(checkpoint)


def test_index_that_would_run_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    marker = tmp_path / "was-here"
    replace_index(checkpoint, lambda index: Evil(marker))
    assert verify(checkpoint) == [], "signed by who has tampered"
    with pytest.raises(CheckpointError, match=r"posix\.mkdir is not part of a checkpoint index"):
        read_all(checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "torch.load", "torch.Size.__class__", "moepp.cli.main"])
def test_index_may_name_nothing_but_what_it_needs(checkpoint: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    (checkpoint / ".metadata").write_bytes(f"\x80\x02c{module}\n{attribute}\n.".encode("latin-1"))
    with pytest.raises(CheckpointError, match="is not part of a checkpoint index"):
        TensorReader(checkpoint)


def test_index_that_points_to_pickled_objects_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """DCP itself would unpickle an entry of bytes when its key is asked for."""
    marker = tmp_path / "was-here"
    payload = pickle.dumps(Evil(marker))
    (checkpoint / "__0_0.distcp").write_bytes(payload)

    def change(index: Any) -> Any:
        index.state_dict_metadata = {"w/fp32": BytesStorageMetadata()}
        (key, place), *_ = index.storage_data.items()
        index.storage_data = {type(key)("w/fp32"): type(place)("__0_0.distcp", 0, len(payload))}
        return index

    replace_index(checkpoint, change)
    with pytest.raises(CheckpointError, match="BytesStorageMetadata is not part of a checkpoint index"):
        read_all(checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"a": 1}), pickle.dumps(None)])
def test_index_that_is_none_is_one_clear_error(checkpoint: Path, content: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read \(.*\); use another checkpoint"):
        TensorReader(checkpoint)


@pytest.mark.parametrize("content", ["", "[]", '{"step": 1}', "{"])
def test_unreadable_information_is_one_clear_error(checkpoint: Path, content: str) -> None:
    (checkpoint / "info.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"info\.json cannot be read .*; use another checkpoint"):
        fmt.read_info(checkpoint)

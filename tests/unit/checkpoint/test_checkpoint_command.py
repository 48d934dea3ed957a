"""``moepp checkpoint``: what it shows, refuses and deletes, on checkpoints made by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from moepp.checkpoint import format as fmt
from moepp.checkpoint.storage import write_tensors
from moepp.cli.main import main
from tests.checkpoint_cases import make_info
from tests.dist import WorkerPool

LAYOUT = {"world_size": 2, "expert": 2, "engine": "deepspeed", "zero_stage": 1, "precision": "bf16"}


def write_checkpoint(checkpoints: Path, step: int, lr: float) -> Path:
    folder = checkpoints / fmt.checkpoint_name(step)
    folder.mkdir(parents=True)
    info = make_info(step, step * 1000, config={"optim": {"lr": lr}}, **LAYOUT)
    files = {fmt.INFO: fmt.write_durably(folder / fmt.INFO, json.dumps(asdict(info)))}
    tensors = {"norm.weight/fp32": torch.ones(4) * step, "same/fp32": torch.arange(3.0)}
    files |= write_tensors(folder, tensors, None)
    fmt.write_manifest(folder, files)
    return folder


def _make(rank: int, run: str) -> None:
    for step, lr in ((10, 0.1), (20, 0.1), (30, 0.05)):
        write_checkpoint(Path(run) / "checkpoints", step, lr)


@pytest.fixture
def run(tmp_path: Path, pool_1: WorkerPool) -> Path:
    pool_1.run(_make, str(tmp_path))
    return tmp_path


def test_list_shows_a_line_per_checkpoint_and_what_is_wrong(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = next((run / "checkpoints" / "step-00000020").glob("__0_*"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert main(["checkpoint", "list", str(run)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "tokens", "size", "layout", "state"]
    assert [line.split()[0] for line in lines] == ["10", "20", "30"]
    assert "10,000" in lines[0] and "2 ranks, EP 2, deepspeed, ZeRO 1" in lines[0] and lines[0].endswith("verified")
    assert damaged.name in lines[1] and "SHA-256" in lines[1]
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert "step-00000020: DAMAGED" in capsys.readouterr().out


def test_diff_names_what_changed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "diff", str(run), "10", "30"]) == 0
    out = capsys.readouterr().out
    assert "optim.lr: 0.1 -> 0.05" in out
    assert "norm.weight/fp32  changed by 2.00e+00 of its norm" in out  # 10 -> 30
    assert "same/fp32" not in out
    assert "1 of 2 tensors differ" in out


def test_prune_deletes_only_when_told_and_keeps_a_whole_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [path.name for path in fmt.list_checkpoints(run / "checkpoints")]
    assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert [path.name for path in fmt.list_checkpoints(run / "checkpoints")] == names
    assert "would delete step-00000010" in capsys.readouterr().out

    newest = run / "checkpoints" / "step-00000030" / ".metadata"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1])
    assert main(["checkpoint", "prune", str(run), "--keep", "1", "--yes"]) == 2
    assert "verifies" in capsys.readouterr().err
    assert [path.name for path in fmt.list_checkpoints(run / "checkpoints")] == names

    newest.write_bytes(whole)
    assert main(["checkpoint", "prune", str(run), "--keep", "1", "--keep-every", "20", "--yes"]) == 0
    assert [path.name for path in fmt.list_checkpoints(run / "checkpoints")] == ["step-00000020", "step-00000030"]


def test_wrong_places_and_steps_are_refused_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(run / "checkpoints")]) == 2
    assert main(["checkpoint", "diff", str(run), "10", "11"]) == 2
    assert main(["checkpoint", "prune", str(run), "--keep", "0"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    assert "there are checkpoints after steps 10, 20, 30" in errors[1]


def test_prune_takes_archived_checkpoints_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = run / "checkpoints"
    fmt.archive_checkpoint(checkpoints / "step-00000030")
    assert main(["checkpoint", "list", str(run)]) == 0
    assert "(archived as step-00000030.replaced-1)" in capsys.readouterr().out
    assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    shown = capsys.readouterr().out
    assert "would delete step-00000010\nwould delete step-00000030.replaced-1\n" in shown
    assert len(list(checkpoints.iterdir())) == 3
    assert main(["checkpoint", "prune", str(run), "--keep", "1", "--yes"]) == 0
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000020"]

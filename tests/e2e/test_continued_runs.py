"""What a run continues from: damaged checkpoints, another model, other data, a directory that is in use."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults import ALL
from tests.train_processes import TrainServer, checkpoint_names, records, write_corpus

NATIVE = ["engine=native", "parallel.expert=2"]
ENDLESS = "train.steps=900"
SLOW = ("slow_steps", ALL, 0.05)  # makes it last


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def steps(lines: list[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in lines if "train/grad_norm" in line]


@pytest.fixture(scope="module")
def three_checkpoints(server: TrainServer, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("three") / "run"
    server.train(folder, 2, [corpus, *NATIVE, "train.steps=6", "checkpoint.interval=2", "checkpoint.keep=0"])
    return folder


def copy_run(source: Path, target: Path) -> Path:
    """The same run in another place."""
    shutil.copytree(source, target)
    config = target / "config.yaml"
    config.write_text(config.read_text().replace(str(source), str(target)))
    return target


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_damaged_checkpoints_are_passed_over_with_a_warning(
    server: TrainServer, corpus: str, three_checkpoints: Path, tmp_path: Path
) -> None:
    folder = copy_run(three_checkpoints, tmp_path / "run")
    flip_bit(folder / "checkpoints/step-00000006/__1_0.distcp")
    (folder / "checkpoints/step-00000004/info.json").unlink()
    run = server.train(folder, 2, [corpus, *NATIVE, "train.steps=8", "checkpoint.keep=0"])
    output = run.output(0)
    assert "step-00000006 is damaged and passed over: __1_0.distcp: content changed (SHA-256 differs)" in output
    assert "step-00000004 is damaged and passed over: info.json: missing" in output
    assert "continuing from" in output and "step-00000002 (step 2" in output
    assert "changed since the checkpoint: train.steps: 6 -> 8" in output
    assert steps(records(folder)) == list(range(1, 9))
    # What was passed over is kept, but is not part of the run any more.
    names = ["step-00000002", "step-00000004.replaced-1", "step-00000006.replaced-1", "step-00000008"]
    assert checkpoint_names(folder) == names


def test_going_back_on_purpose_is_not_undone_by_a_restart(
    server: TrainServer, corpus: str, three_checkpoints: Path, tmp_path: Path
) -> None:
    folder = copy_run(three_checkpoints, tmp_path / "run")
    back = f"run.resume={folder}/checkpoints/step-00000002"
    options = [corpus, *NATIVE, "train.steps=6", "checkpoint.interval=3", "checkpoint.keep=0"]
    stop = ("stop_signal_at", 0, 3, int(signal.SIGTERM))
    server.train(folder, 2, [*options, back], [stop], exit_codes=[75, 75])
    run = server.train(folder, 2, options)
    assert "step-00000003 (step 3" in run.output(0)
    assert records(folder) == records(three_checkpoints)


def test_explicit_checkpoint_that_does_not_verify_is_an_error(
    server: TrainServer, corpus: str, three_checkpoints: Path, tmp_path: Path
) -> None:
    folder = copy_run(three_checkpoints, tmp_path / "run")
    damaged = folder / "checkpoints/step-00000004"
    with (damaged / "__0_0.distcp").open("r+b") as stream:
        stream.truncate(100)
    run = server.train(folder, 2, [corpus, *NATIVE, "train.steps=8", f"run.resume={damaged}"], exit_codes=[2, 2])
    (message,) = error_lines(run.output(0))
    assert f"run.resume={damaged} does not verify: __0_0.distcp: 100 bytes, expected " in message
    assert checkpoint_names(folder) == ["step-00000002", "step-00000004", "step-00000006"]


def test_no_whole_checkpoint_at_all_is_an_error(
    server: TrainServer, corpus: str, three_checkpoints: Path, tmp_path: Path
) -> None:
    folder = copy_run(three_checkpoints, tmp_path / "run")
    for path in (folder / "checkpoints").iterdir():
        (path / ".metadata").unlink()
    run = server.train(folder, 2, [corpus, *NATIVE, "train.steps=8"], exit_codes=[2, 2])
    assert "none of the 3 checkpoints" in error_lines(run.output(0))[0]


def test_other_model_is_refused_with_a_line_per_difference(
    server: TrainServer, corpus: str, three_checkpoints: Path, tmp_path: Path
) -> None:
    changes = ["model.hidden_size=32", "model.vocab_size=128", "model.moe.top_k=1", "optim.lr=1e-3"]
    lines = ["  model.vocab_size: 64 -> 128", "  model.hidden_size: 16 -> 32", "  model.moe.top_k: 2 -> 1"]
    in_place = server.train(three_checkpoints, 2, [corpus, *NATIVE, *changes], exit_codes=[2, 2])
    resume = f"run.resume={three_checkpoints}/checkpoints/step-00000006"
    branch = server.train(tmp_path / "new", 2, [corpus, *NATIVE, *changes, resume], exit_codes=[2, 2])
    for run in (in_place, branch):
        output = run.output(0).splitlines()
        start = next(i for i, line in enumerate(output) if line.startswith("error: "))
        assert output[start + 1 : start + 4] == lines


def test_other_text_under_the_same_name_is_refused(
    server: TrainServer, three_checkpoints: Path, corpus: str, tmp_path: Path
) -> None:
    folder = copy_run(three_checkpoints, tmp_path / "run")
    prefix = Path(corpus.removeprefix("data.paths=[").removesuffix("]"))
    saved = {suffix: prefix.with_suffix(suffix).read_bytes() for suffix in (".bin", ".idx")}
    try:
        write_corpus(prefix, seed=1)
        run = server.train(folder, 2, [corpus, *NATIVE, "train.steps=8"], exit_codes=[2, 2])
    finally:
        for suffix, data in saved.items():
            prefix.with_suffix(suffix).write_bytes(data)
    for key in ("content", "tokens"):
        assert f"\n  data.paths: {prefix}: {key} " in run.output(0)


def test_changed_learning_rate_is_allowed_and_logged(
    server: TrainServer, corpus: str, three_checkpoints: Path, tmp_path: Path
) -> None:
    folder = copy_run(three_checkpoints, tmp_path / "run")
    options = [corpus, *NATIVE, "train.steps=8", "optim.lr=5e-3", "optim.schedule=constant"]
    run = server.train(folder, 2, options)
    assert "changed since the checkpoint: optim.lr: 0.01 -> 0.005" in run.output(0)
    assert [line["optim/lr"] for line in records(folder, after=6) if "optim/lr" in line] == [0.005, 0.005]


def test_second_run_on_a_directory_is_refused(server: TrainServer, corpus: str, tmp_path: Path) -> None:
    first = server.start(tmp_path / "run", 2, [corpus, *NATIVE, ENDLESS], [SLOW])
    first.wait_for("step 2/")
    second = server.train(tmp_path / "run", 2, [corpus, *NATIVE, ENDLESS], exit_codes=[2, 2])
    assert f"is in use by process {first.pids[0]}" in error_lines(second.output(0))[0]
    assert first.poll() == {}
    first.kill(0, signal.SIGTERM)
    assert first.wait() == [75, 75]
    lines = records(tmp_path / "run")
    assert steps(lines) == list(range(1, len(lines) + 1))


def test_information_in_a_checkpoint_is_complete(three_checkpoints: Path) -> None:
    info = json.loads((three_checkpoints / "checkpoints/step-00000004/info.json").read_text())
    assert info["step"] == 4 and info["tokens"] == 4 * 8 * 16
    sizes = {"world_size": 2, "expert": 2, "pipeline": 1, "context": 1, "tensor": 1}
    assert info["layout"] == sizes | {"engine": "native", "zero_stage": 0, "precision": "fp32"}
    assert info["config"]["model"]["hidden_size"] == 16 and info["versions"]["torch"]
    assert info["run_state"]["next_batch"] == 4 and info["run_state"]["seed"] == info["config"]["run"]["seed"]

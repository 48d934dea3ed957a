"""What a run does when its directory, lock, metrics or disk are taken from it while it trains, or W&B dies."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moepp.checkpoint import verify
from tests.data_files import write_word_tokenizer
from tests.faults import ALL
from tests.small_disk import small_disk
from tests.train_processes import TrainRun, TrainServer, checkpoint_names, records

ENGINES = {
    "native": ["engine=native", "parallel.expert=2"],
    "deepspeed": ["engine=deepspeed", "parallel.expert=2"],
}
SLOW = ("slow_steps", ALL, 0.05)  # makes it last
ENDLESS = "train.steps=900"


def engines(default: str) -> pytest.MarkDecorator:
    """Both engines, one of them by default. Where the engine has no part in it there is one test alone."""
    return pytest.mark.parametrize(
        "engine", [pytest.param(name, marks=[] if name == default else [pytest.mark.slow]) for name in ENGINES]
    )


def error_lines(run: TrainRun) -> list[str]:
    return [line for line in run.output(0).splitlines() if line.startswith("error: ")]


def trained_steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in records(run_dir) if "train/grad_norm" in line]


def test_lock_that_was_removed_is_made_again_and_a_run_that_was_taken_over_stops(
    server: TrainServer, corpus: str, tmp_path: Path
) -> None:
    options = [corpus, *ENGINES["deepspeed"], ENDLESS, "checkpoint.interval=5", "checkpoint.keep=0"]
    lock = tmp_path / "run" / ".lock"
    first = server.start(tmp_path / "run", 2, options, [SLOW])
    first.wait_for("step 7/")
    lock.unlink()
    first.wait_for("step 10/")  # by now it is made again
    second = server.train(tmp_path / "run", 2, options, exit_codes=[2, 2])
    assert f"is in use by process {first.pids[0]}" in error_lines(second)[0]
    lock.write_text("process 7 on elsewhere\n0123\n")  # a host that the lock is not passed on to
    assert first.wait() == [2, 5]
    assert "was taken over by process 7 on elsewhere" in error_lines(first)[0]
    end = trained_steps(tmp_path / "run")[-1] + 5
    third = server.start(tmp_path / "run", 2, options, [SLOW])
    third.wait_for(f"step {end}/")
    third.kill(0, signal.SIGTERM)
    assert third.wait() == [75, 75]
    steps = trained_steps(tmp_path / "run")
    assert steps == list(range(1, steps[-1] + 1))
    for name in checkpoint_names(tmp_path / "run"):
        assert verify(tmp_path / "run" / "checkpoints" / name) == []


def test_run_whose_directory_was_removed_stops_and_makes_nothing_again(
    server: TrainServer, corpus: str, tmp_path: Path
) -> None:
    options = [corpus, *ENGINES["native"], ENDLESS, "checkpoint.interval=3"]
    run = server.start(tmp_path / "run", 2, options, [SLOW])
    run.wait_for("step 5/")
    (tmp_path / "run").rename(tmp_path / "gone")  # as rm -rf, in one step
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    assert run.wait() == [2, 5]
    (message,) = error_lines(run)
    assert "was removed, renamed or replaced while this run used it" in message
    assert not (tmp_path / "run").exists()


@engines("deepspeed")
def test_metrics_and_checkpoints_that_were_taken_are_made_again(
    server: TrainServer, corpus: str, tmp_path: Path, engine: str
) -> None:
    options = [corpus, *ENGINES[engine], "train.steps=40", "checkpoint.interval=10"]
    run = server.start(tmp_path / "run", 2, options, [SLOW])
    run.wait_for("step 12/")
    (tmp_path / "other").write_text("other\n")
    (tmp_path / "other").replace(tmp_path / "run" / "metrics.jsonl")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert run.wait() == [0, 0]
    assert run.output(0).count("metrics.jsonl was removed or replaced while the run wrote it") == 1
    assert trained_steps(tmp_path / "run") == list(range(1, 41))
    assert (tmp_path / "run" / "metrics.jsonl.replaced-1").read_text() == "other\n"
    assert "step-00000040" in checkpoint_names(tmp_path / "run")


@pytest.fixture(name="small_disk")
def mounted_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    with small_disk(tmp_path / "disk", "2m") as folder:
        yield folder


def fill(folder: Path) -> Path:
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    return ballast


@engines("native")
def test_disk_that_fills_up_costs_nothing_but_time(
    server: TrainServer, corpus: str, small_disk: Path, tmp_path: Path, engine: str
) -> None:
    """Full at the start, full while training and saving: one line each time, and the next start goes on."""
    run_dir, ballast = small_disk / "run", fill(small_disk)
    options = [corpus, *ENGINES[engine], f"data.cache_dir={tmp_path}/cache", "checkpoint.interval=5"]
    full = f"the disk is full (0.0 MB free at {small_disk})); free space at {small_disk}"
    run = server.train(run_dir, 2, [*options, "train.steps=30"], exit_codes=[2, 2])
    assert len(error_lines(run)) == 1 and full in error_lines(run)[0] and "Traceback" not in run.output(0)
    ballast.unlink()
    run = server.start(run_dir, 2, [*options, "train.steps=30"], [SLOW])
    run.wait_for("step 7/")
    fill(small_disk)
    assert run.wait() == [2, 2]
    assert "Traceback" not in run.output(0)
    assert "could not be saved" in error_lines(run)[0] or "lacks its last" in error_lines(run)[0]
    ballast.unlink()
    server.train(run_dir, 2, [*options, "train.steps=30"])
    assert trained_steps(run_dir) == list(range(1, 31))


def test_samples_that_found_the_disk_full_are_drawn_by_the_next_start(
    server: TrainServer, corpus: str, small_disk: Path, tmp_path: Path
) -> None:
    tokenizer = write_word_tokenizer(tmp_path / "tokenizer.json", 62)
    run_dir, ranks = small_disk / "run", 2
    options = [corpus, *ENGINES["native"], f"data.cache_dir={tmp_path}/cache", "train.steps=4", "train.samples=2"]
    options += [f"data.tokenizer={tokenizer}"]
    run = server.train(run_dir, ranks, options, [("fill_disk_before_samples", 0, str(small_disk))], exit_codes=[2, 2])
    (message,) = error_lines(run)
    assert "training is done and saved, but its samples are not: cannot write " in message
    assert f"the disk is full (0.0 MB free at {small_disk}); free space at {small_disk}" in message
    assert "Traceback" not in run.output(0)
    assert checkpoint_names(run_dir) == ["step-00000004"] and trained_steps(run_dir) == [1, 2, 3, 4]
    assert not [path.name for path in run_dir.iterdir() if "samples.json" in path.name]
    saved = verify(run_dir / "checkpoints/step-00000004"), (run_dir / "metrics.jsonl").read_bytes()
    (small_disk / "ballast").unlink()
    server.train(run_dir, ranks, options)
    assert saved == ([], (run_dir / "metrics.jsonl").read_bytes()) and checkpoint_names(run_dir) == ["step-00000004"]
    samples = json.loads((run_dir / "samples.json").read_text())
    server.train(tmp_path / "other", ranks, options)
    assert samples == json.loads((tmp_path / "other/samples.json").read_text()), "as if there had always been space"
    assert "nothing to do" in server.train(run_dir, ranks, options).output(0)


def service_of(pid: int, limit_seconds: float = 30.0) -> int:
    """Process id of the W&B service of a training process."""
    deadline = time.monotonic() + limit_seconds
    while time.monotonic() < deadline:
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, _, rest = status.read_text().partition("(")[2].rpartition(")")
            except OSError:
                continue
            if name.startswith(("wandb-core", "gpu_stats")) and int(rest.split()[1]) == pid:
                return int(status.parent.name)
        time.sleep(0.05)
    raise TimeoutError("no W&B service")


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_training_ends_well_and_draws_its_samples_although_the_wandb_service_dies(
    server: TrainServer, corpus: str, tmp_path: Path, number: signal.Signals
) -> None:
    tokenizer = write_word_tokenizer(tmp_path / "tokenizer.json", 62)
    options = [corpus, "engine=native", "train.steps=40", "logging.wandb.mode=offline"]
    options += [f"data.tokenizer={tokenizer}", "train.samples=1"]
    run = server.start(tmp_path / "run", 1, options, [SLOW, ("wait_for_wandb", ALL, 3.0)])
    run.wait_for("step 5/")
    os.kill(service_of(run.pids[0]), number)
    assert run.wait() == [0]
    assert run.output(0).count("W&B failed") == 1 and "Traceback" not in run.output(0)
    assert trained_steps(tmp_path / "run") == list(range(1, 41))
    assert (tmp_path / "run" / "samples.json").exists() and "step-00000040" in checkpoint_names(tmp_path / "run")

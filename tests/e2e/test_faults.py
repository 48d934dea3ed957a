"""What a run does when something goes wrong: signals, broken steps, lost ranks, full disks."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepp.checkpoint import verify
from tests.faults import ALL
from tests.train_processes import ROOT, THREADS, TINY, TrainServer, checkpoint_names, records, without_skips

HOST = socket.gethostname()
NATIVE = ["engine=native", "parallel.expert=2"]
DEEPSPEED = ["engine=deepspeed", "parallel.expert=2"]
ENDLESS = "train.steps=900"
SLOW = ("slow_steps", ALL, 0.05)  # makes it last
BOTH_ENGINES = pytest.mark.parametrize(
    "engine", [pytest.param(NATIVE, id="native"), pytest.param(DEEPSPEED, id="deepspeed", marks=pytest.mark.slow)]
)


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def steps(lines: list[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in lines if "train/grad_norm" in line]


# --- signals


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
@BOTH_ENGINES
def test_stop_signal_on_any_rank_saves_on_all_and_exits_for_requeueing(
    server: TrainServer, corpus: str, tmp_path: Path, engine: list[str], number: signal.Signals, rank: int
) -> None:
    run = server.start(tmp_path / "run", 2, [corpus, *engine, ENDLESS], [SLOW])
    run.wait_for("step 5/")
    run.kill(rank, number)
    run.kill(rank, number)  # schedulers send it twice
    assert run.wait() == [75, 75]
    (name,) = checkpoint_names(tmp_path / "run")
    step = int(name.removeprefix("step-"))
    assert verify(tmp_path / "run/checkpoints" / name) == []
    (message,) = error_lines(run.output(0))
    assert f"after step {step}" in message and "its state is saved" in message
    assert (number.name if rank == 0 else "a signal on another rank") in message
    assert steps(records(tmp_path / "run")) == list(range(1, step + 1))


# --- broken steps


NAN_LOSS = ("scale_loss_of_batches", 1, 3, 3, math.nan)
INFINITE_LOSS = ("scale_loss_of_batches", 1, 3, 3, math.inf)
INFINITE_AUXILIARY_LOSS = ("infinite_auxiliary_loss_of_batch", 1, 3)
BROKEN_STEPS = [
    (["engine=native"], "fp32", NAN_LOSS),
    (["engine=native"], "fp32", INFINITE_AUXILIARY_LOSS),
    (["engine=deepspeed", "parallel.zero_stage=2", "parallel.expert=2"], "bf16", NAN_LOSS),
]
SLOW_BROKEN_STEPS = [
    (["engine=native", "parallel.expert=2"], "bf16", INFINITE_LOSS),
    (["engine=deepspeed", "parallel.zero_stage=0", "parallel.expert=2"], "fp32", NAN_LOSS),
    (["engine=deepspeed", "parallel.zero_stage=1", "parallel.expert=2"], "fp32", NAN_LOSS),
    (["engine=deepspeed", "parallel.zero_stage=1"], "bf16", INFINITE_AUXILIARY_LOSS),
]


@pytest.mark.parametrize(
    ("engine", "precision", "fault"),
    [*BROKEN_STEPS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_BROKEN_STEPS)],
)
def test_broken_step_of_one_rank_is_skipped_on_all_and_leaves_no_trace(
    server: TrainServer, corpus: str, tmp_path: Path, engine: list[str], precision: str, fault: Any
) -> None:
    """A step that is skipped counts as a step, but nothing else: the rest is a run whose data lack that batch."""
    options = [corpus, *engine, f"train.precision={precision}", "train.steps=7", "optim.schedule=constant"]
    run = server.train(tmp_path / "run", 2, options, [fault])
    assert run.output(0).count("step 4 skipped: the loss is not finite") == 1
    server.train(tmp_path / "without", 2, [*options, "train.steps=6"], [("leave_out_batch", ALL, 3)])
    found, expected = records(tmp_path / "run"), records(tmp_path / "without")
    skipped = next(line for line in found if line["step"] == 4)
    assert skipped["train/skipped_steps"] == 1 and "train/loss" not in skipped
    kept = [line for line in found if line["step"] != 4 and "train/loss" in line]
    for line, reference in zip(kept, [line for line in expected if "train/loss" in line], strict=True):
        assert line["train/loss"] == reference["train/loss"]
        assert line["train/grad_norm"] == reference["train/grad_norm"]
    assert found[-1]["eval/loss"] == expected[-1]["eval/loss"]


@BOTH_ENGINES
def test_gradient_that_overflows_with_a_finite_loss_is_skipped(
    server: TrainServer, corpus: str, tmp_path: Path, engine: list[str]
) -> None:
    fault = ("break_gradient_at", 1, 4)
    run = server.train(tmp_path / "run", 2, [corpus, *engine, "train.steps=6"], [fault])
    assert run.output(0).count("step 4 skipped: the gradient is not finite") == 1
    assert [line.get("train/skipped_steps") for line in records(tmp_path / "run")][:5] == [0, 0, 0, 1, 1]


@BOTH_ENGINES
def test_too_many_broken_steps_in_a_row_stop_the_run_also_across_a_restart(
    server: TrainServer, corpus: str, tmp_path: Path, engine: list[str]
) -> None:
    options = [corpus, *engine, "train.steps=20", "guard.max_skipped_steps=4", "checkpoint.interval=5"]
    broken = ("scale_loss_of_batches", 0, 3, 100, math.nan)
    run = server.train(tmp_path / "run", 2, options, [broken], exit_codes=[4, 4])
    (message,) = error_lines(run.output(0))
    assert "4 steps in a row (guard.max_skipped_steps), up to step 7" in message and "optim.lr" in message
    assert checkpoint_names(tmp_path / "run") == ["step-00000005"]
    run = server.train(tmp_path / "run", 2, options, [broken], exit_codes=[4, 4])  # steps 4 and 5 are remembered
    assert "4 steps in a row (guard.max_skipped_steps), up to step 7" in error_lines(run.output(0))[0]
    server.train(tmp_path / "run", 2, options)  # the cause is gone
    assert records(tmp_path / "run")[-2]["train/skipped_steps"] == 2


SPIKE = ("scale_loss_of_batches", ALL, 12, 12, 1.5)
SPIKES = ["guard.spike_sigma=6", "guard.spike_window=8", "train.steps=16", "checkpoint.interval=5", "checkpoint.keep=0"]


@BOTH_ENGINES
def test_loss_spike_is_skipped_and_counted(server: TrainServer, corpus: str, tmp_path: Path, engine: list[str]) -> None:
    run = server.train(tmp_path / "run", 2, [corpus, *engine, *SPIKES], [SPIKE])
    assert run.output(0).count("loss spike, update skipped") == 1 and "step 13: loss spike" in run.output(0)
    assert [line.get("train/skipped_steps") for line in records(tmp_path / "run")][11:13] == [0, 1]


# Whatever holds the state has to take it back while training is under way: shares of weights, too, and stages.
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(NATIVE, id="native"),
        pytest.param(DEEPSPEED, id="deepspeed"),
        pytest.param([*NATIVE, "parallel.zero_stage=1"], id="zero-1", marks=pytest.mark.exhaustive),
        pytest.param(["engine=fsdp", "parallel.expert=2"], id="fsdp"),
        pytest.param(["engine=native", "parallel.pipeline=2", "train.micro_batch_size=2"], id="pipeline"),
    ],
)
def test_loss_spike_rewinds_to_the_newest_checkpoint_and_leaves_its_batches_out(
    server: TrainServer, corpus: str, tmp_path: Path, engine: list[str]
) -> None:
    options = [corpus, *engine, *SPIKES, "guard.spike_action=rewind", "optim.schedule=constant"]
    spike = ("scale_reported_loss_of_batches", *SPIKE[1:])
    run = server.train(tmp_path / "run", 2, [*options, "checkpoint.async=true"], [spike])
    assert "rewound to step 10; batches up to 12 are left out" in run.output(0)
    # The oracle never sees batches 10 to 12 at all.
    server.train(tmp_path / "without", 2, options, [("leave_out_batch", ALL, 10, 13)])
    found, expected = records(tmp_path / "run"), records(tmp_path / "without")
    assert without_skips(found) == without_skips(expected)
    assert steps(found) == list(range(1, 17))
    # Continuing from a checkpoint after the rewind leaves them out too.
    resume = f"run.resume={tmp_path}/run/checkpoints/step-00000015"
    server.train(tmp_path / "branch", 2, [*options, resume])
    assert records(tmp_path / "branch") == records(tmp_path / "run", after=15)


@BOTH_ENGINES
def test_endless_spikes_stop_the_run(server: TrainServer, corpus: str, tmp_path: Path, engine: list[str]) -> None:
    options = [corpus, *engine, *SPIKES, "guard.spike_action=rewind", "guard.max_rewinds=2"]
    run = server.train(tmp_path / "run", 2, options, [("scale_loss_of_batches", ALL, 12, 100, 1.5)], exit_codes=[4, 4])
    assert "after 2 rewinds (guard.max_rewinds)" in error_lines(run.output(0))[0]


# --- lost ranks


def check_lost_rank(
    server: TrainServer, folder: Path, options: list[str], ranks: int, lost: int, number: signal.Signals
) -> None:
    limit = 20 if number == signal.SIGKILL else 6  # a killed rank is noticed at once, a stopped one by its silence
    run = server.start(folder, ranks, [*options, ENDLESS, f"parallel.timeout_seconds={limit}"], [SLOW])
    run.wait_for("step 3/")
    start = time.monotonic()
    run.kill(lost, number)
    others = [rank for rank in range(ranks) if rank != lost]
    assert run.wait(others) == [5] * len(others)
    assert time.monotonic() - start < limit + 30  # on a busy machine; idle it takes 2 beyond the silence
    for rank in others:
        (message,) = error_lines(run.output(rank))
        assert f"rank {rank} stops: rank {lost} on {HOST} does not answer (last collective: " in message
        assert "none" not in message
        assert message in (folder / f"log/rank-{rank}.txt").read_text().replace(
            "moepp.training.run: rank", "moepp.training.run: error: rank"
        )
    run.end()


@pytest.mark.parametrize(
    ("ranks", "lost", "number"), [(2, 0, signal.SIGKILL), (2, 1, signal.SIGSTOP), (4, 2, signal.SIGKILL)]
)
def test_others_stop_soon_and_name_the_lost_rank(
    server: TrainServer, corpus: str, tmp_path: Path, ranks: int, lost: int, number: signal.Signals
) -> None:
    check_lost_rank(server, tmp_path / "run", [corpus, *NATIVE], ranks, lost, number)


# With the test above: each engine with each signal; the first rank, an inner one and the last, of 2 and of 4.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "ranks", "lost", "number"),
    [
        pytest.param(DEEPSPEED, 2, 0, signal.SIGKILL, id="deepspeed-2-0-kill", marks=pytest.mark.exhaustive),
        pytest.param(DEEPSPEED, 2, 1, signal.SIGSTOP, id="deepspeed-2-1-stop"),
        pytest.param(DEEPSPEED, 4, 3, signal.SIGKILL, id="deepspeed-4-3-kill"),
        pytest.param(NATIVE, 4, 0, signal.SIGSTOP, id="native-4-0-stop", marks=pytest.mark.exhaustive),
        pytest.param(NATIVE, 4, 1, signal.SIGKILL, id="native-4-1-kill", marks=pytest.mark.exhaustive),
    ],
)
def test_others_stop_soon_whichever_rank_is_lost(
    server: TrainServer, corpus: str, tmp_path: Path, engine: list[str], ranks: int, lost: int, number: signal.Signals
) -> None:
    check_lost_rank(server, tmp_path / "run", [corpus, *engine], ranks, lost, number)


@BOTH_ENGINES
def test_others_stop_with_the_error_of_a_rank_that_failed(
    server: TrainServer, corpus: str, tmp_path: Path, engine: list[str]
) -> None:
    run = server.start(tmp_path / "run", 2, [corpus, *engine, "train.steps=9"], [("raise_at", 1, 4)])
    assert run.wait() == [5, 1]
    assert f"rank 0 stops: rank 1 on {HOST} failed with ValueError: injected error" in error_lines(run.output(0))[0]
    assert "ValueError: injected error" in run.output(1)


def test_slow_rank_within_the_limit_is_waited_for(server: TrainServer, corpus: str, tmp_path: Path) -> None:
    options = [corpus, *NATIVE, "train.steps=4", "parallel.timeout_seconds=30"]
    server.train(tmp_path / "run", 2, options, [("hang_at", 1, 3, 3.0)])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_recovers_by_itself_from_killed_ranks(corpus: str, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", (tmp_path / "log").open("w")
    options = [corpus, *TINY, *NATIVE, "train.steps=200", "checkpoint.interval=10", "checkpoint.async=true"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=4"]
    environ = os.environ | THREADS | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        [*torchrun, "train.py", f"run.dir={folder}", *options], cwd=ROOT, env=environ, stdout=log, stderr=log
    )
    try:
        for lost in (0, 1):
            wait_until(lambda: has_checkpoint(folder), 120)
            wait_until(lambda restarts=lost: (tmp_path / "log").read_text().count("continuing from") == restarts, 120)
            workers = worker_pids(process.pid)
            os.kill(workers[lost], signal.SIGKILL)
            wait_until(lambda gone=workers: not set(gone) & set(worker_pids(process.pid)), 60)
        assert process.wait(240) == 0, (tmp_path / "log").read_text()[-5000:]
    finally:
        process.kill()
        process.wait()
    assert steps(records(folder)) == list(range(1, 201))
    assert (tmp_path / "log").read_text().count("continuing from") == 2


def has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step-????????"))


def worker_pids(parent: int) -> list[int]:
    """Children of torchrun, in the order of their ranks."""
    children = Path(f"/proc/{parent}/task").glob("*/children")
    return sorted({int(pid) for file in children for pid in file.read_text().split()})


def wait_until(condition: Callable[[], bool], limit_seconds: float) -> None:
    deadline = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


# --- saving


# Both engines by default, each with one way of saving; the other pairs are slow.
@pytest.mark.parametrize(
    ("engine", "background"),
    [
        pytest.param(NATIVE, "true", id="native-background"),
        pytest.param(DEEPSPEED, "false", id="deepspeed-foreground"),
        pytest.param(NATIVE, "false", id="native-foreground", marks=pytest.mark.slow),
        pytest.param(DEEPSPEED, "true", id="deepspeed-background", marks=pytest.mark.slow),
    ],
)
def test_save_that_fails_is_reported_and_the_run_goes_on(
    server: TrainServer, corpus: str, tmp_path: Path, engine: list[str], background: str
) -> None:
    options = [corpus, *engine, "train.steps=9", "checkpoint.interval=3", f"checkpoint.async={background}"]
    run = server.train(tmp_path / "run", 2, [*options, "checkpoint.keep=0"], [("disk_full_at", 1, 6)])
    failure = "checkpoint at step 6 FAILED, training goes on and earlier checkpoints are untouched: rank 1: "
    assert f"{failure}cannot write {tmp_path}/run/checkpoints: the disk is full" in run.output(0)
    assert checkpoint_names(tmp_path / "run") == ["step-00000003", "step-00000009"]
    assert verify(tmp_path / "run/checkpoints/step-00000009") == []


@pytest.mark.parametrize(
    "engine", [pytest.param(DEEPSPEED, id="deepspeed"), pytest.param(NATIVE, id="native", marks=pytest.mark.slow)]
)
def test_last_save_that_fails_is_an_error(server: TrainServer, corpus: str, tmp_path: Path, engine: list[str]) -> None:
    options = [corpus, *engine, "train.steps=4", "checkpoint.interval=2"]
    run = server.train(tmp_path / "run", 2, options, [("disk_full_at", 0, 4)], exit_codes=[2, 2])
    assert "its last state could not be saved: rank 0: cannot write " in error_lines(run.output(0))[0]
    assert checkpoint_names(tmp_path / "run") == ["step-00000002"]
    server.train(tmp_path / "run", 2, options)  # there is space again
    assert checkpoint_names(tmp_path / "run") == ["step-00000002", "step-00000004"]
    assert steps(records(tmp_path / "run")) == [1, 2, 3, 4]

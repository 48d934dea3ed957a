"""Evaluation costs no training: whatever happens to it, the state is saved, and the next start makes up for it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from moepp.checkpoint import list_checkpoints, verify
from tests.faults import ALL
from tests.train_processes import TrainServer, checkpoint_names, records

STEPS = 4
LENGTH = [f"train.steps={STEPS}", "train.eval_interval=2", "train.eval_batches=4", "engine=native"]


@pytest.fixture(scope="module")
def whole(server: TrainServer, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Records of a run without a fault."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    server.train(run_dir, 2, [corpus, *LENGTH])
    found = records(run_dir)
    assert [line["step"] for line in found if "eval/loss" in line] == [2, STEPS]
    return found


@pytest.mark.parametrize(
    ("fault", "codes", "saved"),
    [
        (("fail_in_evaluation", ALL, STEPS), [1, 1], STEPS),
        (("stop_signal_in_evaluation", 1, 2, int(signal.SIGTERM)), [75, 75], 2),
        (("stop_signal_in_evaluation", 0, STEPS, int(signal.SIGUSR1)), [75, 75], STEPS),
        (("stop_signal_at", 1, 2, int(signal.SIGTERM)), [75, 75], 2),
        (("stop_signal_at", 0, STEPS, int(signal.SIGTERM)), [75, 75], STEPS),
    ],
    ids=["failure at the end", "signal within", "signal within the last", "signal before", "signal before the last"],
)
def test_the_state_is_saved_and_the_next_start_evaluates(
    server: TrainServer, corpus: str, tmp_path: Path, whole: list[dict[str, Any]], fault: Any, codes: Any, saved: int
) -> None:
    run_dir = tmp_path / "run"
    server.train(run_dir, 2, [corpus, *LENGTH], [fault], exit_codes=codes)
    assert checkpoint_names(run_dir) == [f"step-{saved:08d}"]
    assert verify(list_checkpoints(run_dir / "checkpoints")[-1]) == []
    assert not [line for line in records(run_dir, after=saved - 1) if "eval/loss" in line]
    server.train(run_dir, 2, [corpus, *LENGTH])
    assert records(run_dir) == whole
    again = server.train(run_dir, 2, [corpus, *LENGTH])
    assert "nothing to do" in again.output(0) and records(run_dir) == whole


@pytest.mark.parametrize(("where", "named"), [("step", "step 2"), ("evaluation", "the evaluation after step 2")])
def test_memory_that_does_not_suffice_is_one_line_of_the_rank(
    server: TrainServer, corpus: str, tmp_path: Path, where: str, named: str
) -> None:
    run = server.train(tmp_path / "run", 2, [corpus, *LENGTH], [("no_memory", 1, where)], exit_codes=[5, 4])
    [line] = [line for line in run.output(1).splitlines() if line.startswith("error: ")]
    assert line.startswith(
        f"error: out of memory in {named} on rank 1 (CUDA out of memory.); lower train.micro_batch_size"
    )
    assert "Traceback" not in run.output(0) + run.output(1)


def test_a_run_that_begins_with_another_ones_checkpoint_does_not_evaluate_it_again(
    server: TrainServer, corpus: str, tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    server.train(tmp_path / "first", 2, [corpus, *LENGTH, "checkpoint.interval=2", "checkpoint.keep=0"])
    resume = f"run.resume={tmp_path}/first/checkpoints/step-00000002"
    server.train(tmp_path / "branch", 2, [corpus, *LENGTH, resume])
    assert records(tmp_path / "branch") == [line for line in whole if line["step"] > 2]

"""Ranks killed at random moments, saves in progress included: the run ends as if nothing had ever happened.

The seed of a failure is in its message; MOEPP_CHAOS_SEED repeats it (as far as a scheduler repeats anything).
MOEPP_CHAOS_ROUNDS sets the rounds of the exhaustive tests.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from moepp.checkpoint import list_checkpoints, verify
from moepp.checkpoint.storage import TensorReader
from tests.faults import ALL
from tests.train_processes import TrainRun, TrainServer, records

ROUNDS = int(os.environ.get("MOEPP_CHAOS_ROUNDS", 4))
MAX_STEPS = 10  # before a kill
STEPS_PER_ROUND = 40  # more than a round can do, by 1 s, so that the run is never done before its last round
SLOW = [("slow_steps", ALL, 0.05), ("slow_writing", ALL, 0.05)]  # to spend more time in each place where one can die


def kill_at_random_moment(run: TrainRun, draw: random.Random) -> str:
    """Kill one rank, perhaps soon the other too, as a launcher would; returns when it hit."""
    moment = draw.choice(["starting", "training", "training", "saving", "saving"])
    if moment == "starting":
        time.sleep(draw.uniform(0.1, 1.5))
    else:
        lines = draw.randint(1, MAX_STEPS // 2)
        while run.output(0).count("grad norm") < lines and not run.poll():
            time.sleep(0.005)
    if moment == "saving":
        while not any((run.run_dir / "checkpoints").glob(".step-*.tmp")) and not run.poll():
            time.sleep(0.002)
    time.sleep(draw.uniform(0.0, 0.3))
    first = draw.randrange(2)
    run.kill(first, signal.SIGKILL)
    if draw.random() < 0.7:
        time.sleep(draw.uniform(0.0, 0.5))
        run.kill(1 - first, signal.SIGKILL)
        moment += ", both ranks"
    codes = run.wait()
    assert codes[first] == -signal.SIGKILL and codes[1 - first] in (-signal.SIGKILL, 5), codes
    return moment


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor; numbers come back exactly in float64, and generators' bytes too."""
    reader = TensorReader(checkpoint)
    found = {key: torch.empty(shape, dtype=torch.float64) for key, shape in reader.shapes.items()}
    reader.fill(found)
    return found


def check_chaos(server: TrainServer, corpus: str, folder: Path, rounds: int, engine: str) -> None:
    seed = int(os.environ.get("MOEPP_CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    note = f"MOEPP_CHAOS_SEED={seed}"
    print(note)
    draw = random.Random(seed)
    steps = STEPS_PER_ROUND * rounds
    options = [corpus, f"engine={engine}", "parallel.expert=2", f"train.steps={steps}", "train.log_interval=2"]
    options += ["train.precision=bf16" if engine == "deepspeed" else "train.precision=fp32"]
    options += ["parallel.timeout_seconds=20"]
    options += ["checkpoint.interval=4", "checkpoint.async=true", "checkpoint.keep=2", "checkpoint.keep_every=20"]
    server.train(folder / "whole", 2, options)
    moments = Counter()
    for number in range(rounds):
        run = server.start(folder / "run", 2, options, SLOW)
        moments[kill_at_random_moment(run, draw)] += 1
        for checkpoint in list_checkpoints(folder / "run/checkpoints"):
            assert verify(checkpoint) == [], f"round {number}, {checkpoint.name}; {note}"
    server.train(folder / "run", 2, options)
    print(f"survived {rounds} rounds: {dict(moments)}")

    assert records(folder / "run") == records(folder / "whole"), note
    names = [path.name for path in sorted((folder / "whole/checkpoints").iterdir())]
    assert [path.name for path in sorted((folder / "run/checkpoints").iterdir())] == names, note
    last, expected = (tensors(folder / run / "checkpoints" / names[-1]) for run in ("run", "whole"))
    assert last.keys() == expected.keys()
    assert all(torch.equal(last[key], expected[key]) for key in expected), note


@pytest.mark.parametrize(("engine", "rounds"), [("native", 2), ("deepspeed", 1)])
def test_killed_ranks_leave_no_trace(
    server: TrainServer, corpus: str, tmp_path: Path, engine: str, rounds: int
) -> None:
    check_chaos(server, corpus, tmp_path, rounds, engine)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["native", "deepspeed"])
def test_killed_ranks_leave_no_trace_in_many_rounds(
    server: TrainServer, corpus: str, tmp_path: Path, engine: str
) -> None:
    check_chaos(server, corpus, tmp_path, ROUNDS, engine)

"""A stopped and continued run is the run that never stopped; in another layout it differs by rounding alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults import ALL
from tests.train_processes import SEQUENCES_PER_EPOCH, TrainServer, checkpoint_names, records

STEPS, SAVED_STEP = 18, 7
assert SAVED_STEP * 8 < SEQUENCES_PER_EPOCH < STEPS * 8  # the data starts over after the checkpoint
LENGTH = [f"train.steps={STEPS}", "train.log_interval=3", "train.eval_interval=6"]  # 7 lies inside a log interval
ENGINES = ["engine=native", "engine=deepspeed"]

# Whatever depends on the ranks on purpose is off: with capacity, each rank drops tokens of its own.
LAYOUT_FREE = ["model.moe.capacity_factor=null", "model.moe.balance_loss_scope=global_batch"]
TOLERANCES = {
    "train/loss": 1e-5,
    "train/grad_norm": 1e-5,
    "optim/lr": 0.0,
    "eval/loss": 1e-5,
    # Counts of choices: rounding may turn one of the 512 of a step where two experts score the same.
    "train/balance_loss": 1e-2,
    "routing/ffn_per_token": 1e-2,
}


def inputs(folder: Path, rank: int) -> list[str]:
    return (folder / f"rank-{rank}.txt").read_text().splitlines()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_continued_run_is_bitwise_the_uninterrupted_one(
    server: TrainServer, corpus: str, tmp_path: Path, engine: str, precision: str
) -> None:
    options = [corpus, engine, "parallel.expert=2", f"train.precision={precision}", *LENGTH]
    for name in ("whole-inputs", "parts-inputs"):
        (tmp_path / name).mkdir()
    server.train(tmp_path / "whole", 2, options, [("record_inputs", ALL, str(tmp_path / "whole-inputs"))])
    record = ("record_inputs", ALL, str(tmp_path / "parts-inputs"))
    stop = ("stop_signal_at", 1, SAVED_STEP, int(signal.SIGTERM))
    server.train(tmp_path / "parts", 2, options, [record, stop], exit_codes=[75, 75])
    assert checkpoint_names(tmp_path / "parts") == [f"step-{SAVED_STEP:08d}"]
    server.train(tmp_path / "parts", 2, options, [record])

    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    for rank in (0, 1):
        whole = inputs(tmp_path / "whole-inputs", rank)
        assert inputs(tmp_path / "parts-inputs", rank) == whole  # batches, and the random generator's numbers
        assert len({line.split()[1] for line in whole}) == STEPS
    assert inputs(tmp_path / "whole-inputs", 0) != inputs(tmp_path / "whole-inputs", 1)


def test_accumulated_steps_and_saving_in_the_background_change_nothing(
    server: TrainServer, corpus: str, tmp_path: Path
) -> None:
    options = [
        corpus,
        "engine=native",
        "train.micro_batch_size=2",
        "model.moe.balance_loss_scope=global_batch",
        *LENGTH,
    ]
    server.train(tmp_path / "whole", 2, options)
    saving = [*options, "checkpoint.interval=1", "checkpoint.async=true", "checkpoint.keep=0"]
    run = server.train(tmp_path / "saved", 2, saving)
    assert checkpoint_names(tmp_path / "saved") == [f"step-{step:08d}" for step in range(1, STEPS + 1)]
    assert records(tmp_path / "saved") == records(tmp_path / "whole")
    assert all(f"step-{step:08d}: 0." in run.output(0) for step in range(1, STEPS + 1)), "each save is reported"
    resume = f"run.resume={tmp_path}/saved/checkpoints/step-00000010"
    server.train(tmp_path / "branch", 2, [*options, resume])
    assert records(tmp_path / "branch") == records(tmp_path / "whole", after=10)


def test_wandb_continues_the_same_run(server: TrainServer, corpus: str, tmp_path: Path) -> None:
    options = [corpus, "engine=native", "train.steps=6", "logging.wandb.mode=offline"]
    stop = ("stop_signal_at", 0, 3, int(signal.SIGUSR1))
    server.train(tmp_path / "run", 1, options, [stop], exit_codes=[75])
    info = json.loads((tmp_path / "run/checkpoints/step-00000003/info.json").read_text())
    server.train(tmp_path / "run", 1, options)
    folders = sorted(path.name for path in (tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert {name.rpartition("-")[2] for name in folders} == {info["run_state"]["wandb_run_id"]}


@pytest.mark.parametrize(
    "engine", [["engine=native"], ["engine=deepspeed", "parallel.zero_stage=1"]], ids=["native", "deepspeed"]
)
def test_saving_takes_memory_for_the_own_share_and_one_parameter(
    server: TrainServer, corpus: str, tmp_path: Path, engine: list[str]
) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not tell a peak of memory")
    size = [
        "model.hidden_size=128",
        "model.num_layers=4",
        "model.moe.num_ffn_experts=8",
        "model.moe.ffn_hidden_size=512",
    ]
    options = [corpus, *engine, *size, "parallel.expert=2", "train.steps=2", "checkpoint.interval=1"]
    server.train(tmp_path / "run", 2, options, [("measure_saves", ALL, str(tmp_path))])
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    state = json.loads((tmp_path / "run/checkpoints/step-00000002/manifest.json").read_text())["files"]
    everything = sum(file["size"] for file in state.values())
    slack = 8 * 2**20  # buffers of gloo, Python and the allocator
    for measured in ranks:
        assert measured["staged"] < 0.55 * everything
        assert measured["peak"] < measured["staged"] + measured["largest"] + slack < 0.8 * everything, ranks


def layout(ranks: int, expert: int, engine: str, zero: int | None = None) -> Any:
    options = [f"parallel.expert={expert}", f"engine={engine}"] + (
        [] if zero is None else [f"parallel.zero_stage={zero}"]
    )
    name = f"{ranks}ranks-ep{expert}-{engine}" + ("" if zero is None else f"-zero{zero}")
    return pytest.param((ranks, options), id=name)


LAYOUTS = [
    layout(1, 1, "native"),
    layout(1, 1, "deepspeed", 1),
    layout(2, 1, "native"),
    layout(2, 2, "native"),
    layout(2, 1, "deepspeed", 2),
    layout(2, 2, "deepspeed", 0),
    layout(2, 2, "deepspeed", 1),
    layout(4, 2, "native"),
    layout(4, 4, "native"),
    layout(4, 1, "deepspeed", 0),
    layout(4, 2, "deepspeed", 1),
    layout(4, 2, "deepspeed", 2),
    layout(4, 4, "deepspeed", 2),
]
# Each pair changes several things at once: ranks, EP, engine, ZeRO stage. Together they have every value on both sides.
SOME_PAIRS = [(0, 11), (2, 6), (5, 7), (12, 1)]
# What is saved does not depend on the target, nor what is read on the source: each layout once on either side.
SLOW_PAIRS = [(i, (i + 5) % len(LAYOUTS)) for i in range(len(LAYOUTS))]
REFERENCE = 0
RESHARDED = [*LENGTH, *LAYOUT_FREE, "optim.lr=1e-3"]  # low: rounding differences do not grow


@pytest.fixture(scope="module")
def saved(server: TrainServer, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``saved(i)``: directory of a run in LAYOUTS[i] with a checkpoint at SAVED_STEP; REFERENCE goes on to the end."""
    folder, made = tmp_path_factory.mktemp("saved"), set()

    def get(index: int) -> Path:
        if index not in made:
            ranks, options = LAYOUTS[index].values[0]
            keep = [f"checkpoint.interval={SAVED_STEP}", "checkpoint.keep=0"]
            stop = [] if index == REFERENCE else [("stop_signal_at", 0, SAVED_STEP, int(signal.SIGTERM))]
            codes = [75 if stop else 0] * ranks
            server.train(folder / str(index), ranks, [corpus, *options, *RESHARDED, *keep], stop, codes)
            made.add(index)
        return folder / str(index)

    return get


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [(line["step"], line["tokens"]) for line in found] == [(line["step"], line["tokens"]) for line in expected]
    for line, reference in zip(found, expected, strict=True):
        for name, tolerance in TOLERANCES.items():
            assert (name in line) == (name in reference)
            if name in line:
                assert line[name] == pytest.approx(reference[name], rel=tolerance, abs=0), (line["step"], name)


def check_pair(server: TrainServer, corpus: str, saved: Any, source: int, target: int, folder: Path) -> None:
    checkpoint = saved(source) / "checkpoints" / f"step-{SAVED_STEP:08d}"
    ranks, options = LAYOUTS[target].values[0]
    server.train(folder, ranks, [corpus, *options, *RESHARDED, f"run.resume={checkpoint}"])
    found = records(folder)
    assert found[0]["step"] == 9  # logged over steps 7 to 9, of which the checkpoint knows the first
    assert_close(found, records(saved(REFERENCE), after=SAVED_STEP))


@pytest.mark.parametrize(
    ("source", "target"), [*SOME_PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW_PAIRS)]
)
def test_checkpoint_of_one_layout_continues_in_another(
    server: TrainServer, corpus: str, saved: Any, tmp_path: Path, source: int, target: int
) -> None:
    check_pair(server, corpus, saved, source, target, tmp_path / "run")

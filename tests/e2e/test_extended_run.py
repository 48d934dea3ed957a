"""A run with parts from docs/examples: logged, saved, continued bitwise, read by commands; and a run of older code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import docs.examples.bias_router
import docs.examples.negate_expert
import docs.examples.scale_expert  # noqa: F401
from moepp.checkpoint import load_model
from moepp.checkpoint.storage import TensorReader
from moepp.cli.main import main
from moepp.errors import CheckpointError
from moepp.evaluation.load import build_model, find_model
from moepp.model.transformer import Transformer
from tests.dist import WorkerPool
from tests.faults import ALL
from tests.parity import group_of
from tests.train_processes import ROOT, TrainServer, records, without_skips

PLUGINS = [f"docs.examples.{name}" for name in ("bias_router", "negate_expert", "scale_expert")]
PARTS = [
    f"runtime.plugins=[{','.join(PLUGINS)}]",
    "model.moe.router=bias",
    "model.moe.gate_normalization=none",
    "++model.moe.router_options.bias_update_rate=0.01",
    "++model.moe.extra_experts.negate=1",
    "++model.moe.extra_experts.scale=1",
    "checkpoint.interval=2",
    "checkpoint.keep=0",
    "train.steps=4",
    "profile.steps=[2]",
]
BUFFERS = [f"layers.{layer}.moe.router.bias/buffer" for layer in range(2)]
OLD = ROOT / "tests/golden/old_run"


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = TensorReader(checkpoint)
    found = {key: torch.empty(shape, dtype=reader.dtypes[key]) for key, shape in reader.shapes.items()}
    reader.fill(found)
    return found


def assert_same_bits(first: Path, second: Path) -> None:
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.fixture(scope="module")
def run(server: TrainServer, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extended") / "run"
    server.train(folder, 2, [corpus, *PARTS, "parallel.expert=2", "train.precision=bf16"])
    return folder


def test_the_chosen_step_is_profiled(run: Path) -> None:
    [trace] = (run / "profile").iterdir()
    assert trace.name == "step-00000002-rank-0.json"
    assert any(event.get("name", "").startswith("aten::") for event in json.loads(trace.read_text())["traceEvents"])


def test_every_kind_is_logged_and_every_buffer_saved(run: Path) -> None:
    for record in records(run):
        for layer in range(2) if "train/loss" in record else ():
            kinds = ("ffn", "constant", "copy", "zero", "negate", "scale")
            assert sum(record[f"routing/layer_{layer}/share_{kind}"] for kind in kinds) == pytest.approx(1, abs=1e-6)
    saved = tensors(run / "checkpoints/step-00000004")
    assert sorted(key for key in saved if key.endswith("/buffer")) == BUFFERS
    for key in BUFFERS:
        assert saved[key].dtype == torch.float32 and saved[key].any()
        # Four steps of 0.01 each, up or down, or none where the load was the mean.
        assert torch.equal((saved[key] * 100).round().abs().clamp(max=4), (saved[key] * 100).round().abs())
    assert saved["layers.0.moe.zero_computation.scale.factor/fp32"].shape == (1, 16)


@pytest.mark.parametrize("engine", ["native", "deepspeed", "fsdp"])
def test_continued_run_is_bitwise_the_uninterrupted_one(
    server: TrainServer, corpus: str, tmp_path: Path, run: Path, engine: str
) -> None:
    whole = run
    options = [corpus, *PARTS, "parallel.expert=2", "train.precision=bf16", f"engine={engine}"]
    if engine != "deepspeed":
        whole = tmp_path / "whole"
        server.train(whole, 2, options)
    continued = tmp_path / "continued"
    shutil.copytree(whole, continued)
    shutil.rmtree(continued / "checkpoints/step-00000004")
    server.train(continued, 2, options)
    assert records(continued, after=2) == records(whole, after=2)
    assert_same_bits(continued / "checkpoints/step-00000004", whole / "checkpoints/step-00000004")


@pytest.mark.parametrize("engine", ["native", "deepspeed"])
def test_rewind_brings_the_buffers_of_the_checkpoint_back(
    server: TrainServer, corpus: str, tmp_path: Path, engine: str
) -> None:
    options = [corpus, *PARTS, "parallel.expert=2", f"engine={engine}", "optim.schedule=constant", "train.steps=8"]
    guard = ["guard.spike_sigma=6", "guard.spike_window=4", "guard.spike_action=rewind", "checkpoint.interval=3"]
    # Steps 1 to 6 train on batches 0 to 5; the loss of batch 7 sends step 8 back to step 6.
    run = server.train(tmp_path / "run", 2, [*options, *guard], [("scale_reported_loss_of_batches", ALL, 7, 7, 1.5)])
    assert "rewound to step 6; batches up to 7 are left out" in run.output(0)
    server.train(tmp_path / "without", 2, [*options, *guard], [("leave_out_batch", ALL, 6, 8)])
    found, wanted = records(tmp_path / "run"), records(tmp_path / "without")
    assert without_skips(found) == without_skips(wanted)
    assert_same_bits(tmp_path / "run/checkpoints/step-00000008", tmp_path / "without/checkpoints/step-00000008")
    assert not torch.equal(
        tensors(tmp_path / "run/checkpoints/step-00000008")[BUFFERS[0]],
        tensors(tmp_path / "run/checkpoints/step-00000006")[BUFFERS[0]],
    )


def _read(rank: int, run: str, precision: str) -> list[torch.Tensor]:
    model = build_model(find_model(run), group_of(1), precision)
    assert next(model.parameters()).dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return [router.bias for router in model.routers]


def test_model_is_read_with_its_buffers_in_every_precision(run: Path, pool_1: WorkerPool) -> None:
    saved = tensors(run / "checkpoints/step-00000004")
    for precision in ("fp32", "bf16"):
        [biases] = pool_1.run(_read, str(run), precision)
        assert [torch.equal(bias, saved[key]) for bias, key in zip(biases, BUFFERS, strict=True)] == [True, True]


def _read_into_another(rank: int, run: str, change: str) -> None:
    found = find_model(run)
    with torch.device("meta"):
        model = Transformer(found.cfg)
    model.to_empty(device="cpu")
    router = model.routers[1]
    if change == "more":
        router.register_buffer("count", torch.zeros(2))
    elif change == "fewer":
        del router.bias
    elif change == "another shape":
        router.bias = torch.zeros(3)
    else:
        router.bias = torch.zeros(len(router.bias), dtype=torch.int64)
    load_model(Path(run) / "checkpoints/step-00000004", model)


@pytest.mark.parametrize("change", ["more", "fewer", "another shape", "another type"])
def test_buffers_that_do_not_fit_are_refused(run: Path, pool_1: WorkerPool, change: str) -> None:
    [message] = pool_1.run(_read_into_another, str(run), change, raises=CheckpointError)
    assert "layers.1.moe.router." in message and "\n" not in message


@pytest.mark.parametrize("form", ["official", "moepp"])
def test_exports_refuse_by_name(run: Path, tmp_path: Path, capsys: Any, form: str) -> None:
    assert main(["export", str(run), str(tmp_path / "out"), "--format", form]) == 2
    error = capsys.readouterr().err
    assert "extra_experts.negate=1" in error and "router=bias" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Commands that build the model of a run; the others read a run without its plugins.
BUILDING = {
    "generate": ["generate", "RUN", "--prompt", "x"],
    "export": ["export", "RUN", "OUT", "--format", "moepp"],
    "eval": ["eval", "RUN", "--tasks", "sciq"],
    "checkpoint bench": ["checkpoint", "bench", "RUN", "--repeat", "1"],
}
READING = {
    "checkpoint list": ["checkpoint", "list", "RUN"],
    "checkpoint verify": ["checkpoint", "verify", "RUN"],
    "checkpoint diff": ["checkpoint", "diff", "RUN", "2", "4"],
    "checkpoint prune": ["checkpoint", "prune", "RUN", "--keep", "2"],
    "report": ["report", "RUN"],
}


ALONE = """
import contextlib, io, json, sys
from moepp.cli.main import main
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([code, err.getvalue()]))
"""


def run_alone(commands: list[list[str]], run: Path, out: Path) -> list[tuple[int, str]]:
    """Exit code and errors of commands, in a process that has imported no plugin."""
    places = {"RUN": str(run), "OUT": str(out)}
    arguments = json.dumps([[places.get(word, word) for word in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", ALONE, arguments], capture_output=True, text=True, cwd=ROOT)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]


def test_commands_that_build_the_model_say_which_plugins_to_pass(run: Path, tmp_path: Path) -> None:
    results = run_alone(list(BUILDING.values()), run, tmp_path / "out")
    for name, (code, error) in zip(BUILDING, results, strict=True):
        assert code == 2 and error.count("\n") == 1, name
        assert "--plugin docs.examples.bias_router --plugin docs.examples.negate_expert" in error, name
    plugins = [word for name in PLUGINS for word in ("--plugin", name)]
    commands = [[*BUILDING[name], *plugins] for name in ("generate", "checkpoint bench")]
    (code, error), bench = run_alone(commands, run, tmp_path / "out")
    assert code == 2 and "tokenizer" in error and "plugin" not in error  # this run has none, which is said later
    assert bench[0] == 0, bench[1]


def test_commands_that_only_read_a_run_need_no_plugins(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    results = run_alone(list(READING.values()), tmp_path / "run", tmp_path / "out")
    assert dict(zip(READING, [code for code, _ in results], strict=True)) == dict.fromkeys(READING, 0), results


def test_run_of_older_code_goes_on(server: TrainServer, tmp_path: Path) -> None:
    """README.md beside it tells how it was made."""
    with tarfile.open(OLD / "run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    options = json.loads((OLD / "overrides.json").read_text())
    server.train(tmp_path / "run", 1, [f"data.paths=[{tmp_path / 'data/text'}]", *options])
    wanted = [json.loads(line) for line in (OLD / "expected.jsonl").read_text().splitlines()]
    found = records(tmp_path / "run", after=3)
    assert [record["step"] for record in found] == [record["step"] for record in wanted]
    for one, other in zip(found, wanted, strict=True):
        for key, value in other.items():
            # Not bitwise: the golden numbers are of one kind of CPU.
            assert one[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key

"""Checks 8 to 10: a small model trained on the device as on the CPU, its checkpoint, and the engines."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moepp.bench.peers import one_process_group
from moepp.checkpoint import Checkpointer, load_training_state
from moepp.config import CheckpointConfig, MoEConfig, OptimConfig
from moepp.distributed.groups import ParallelGroups, build_groups, new_cpu_group
from moepp.distributed.layout import Layout as RankLayout
from moepp.engine.fsdp import why_no_fsdp
from moepp.engine.native import NativeEngine
from moepp.metrics.step_stats import StepStats
from moepp.model.generate import generate
from moepp.model.init import init_parameters
from moepp.model.transformer import Transformer
from tests import parity
from tests.checkpoint_cases import make_info
from tests.gpu.models import ModelRun, paper_model
from tests.gpu.report import Place, Report, is_installed
from tests.parity import History, Layout, Setting, deviation, train

Numbers = dict[str, dict[str, Tensor]]  # by parameter and kind of state
STEPS = 20
ENGINES = (("native", 1), ("fsdp", 3), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2))  # ZeRO stages
# Relative, of the first and of the last step's loss. Rounding moves choices of experts apart with every step.
TRAINING_LIMITS = {"fp32": (1e-5, 1e-2), "bf16": (1e-2, 3e-2)}


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """A process group of this process alone; the groups that were made in it end with it."""
    with one_process_group(device):
        try:
            yield
        finally:
            parity._GROUPS.clear()


def demo_setting(place: Place, precision: str) -> Setting:
    """The demo's model with few tokens, so that it learns in so few steps; smaller on the CPU."""
    model = {
        "vocab_size": place.size(256, 64),
        "hidden_size": place.size(256, 32),
        "num_layers": place.size(4, 2),
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_seq_len": 256,
        "init_std": 0.02,
    }
    return Setting(
        model=tuple(model.items()),
        moe=(("ffn_hidden_size", place.size(512, 24)),),
        optim=(("lr", 1e-3), ("min_lr", 1e-4)),
        steps=place.size(STEPS, 4),
        seq_len=place.size(128, 16),
        precision=precision,
    )


def check_training(place: Place, report: Report) -> None:
    """Losses of the first steps and the evaluation, on the device and on the CPU in float32; then generation."""
    with alone(place.device):
        reference = train(0, demo_setting(place, "fp32"), Layout())
        for precision, (first, last) in TRAINING_LIMITS.items():
            found = train(0, demo_setting(place, precision), Layout(device=place.device.type))
            _compare(report, precision, found, reference, first, last)
    _check_generation(place, report)


def _compare(report: Report, name: str, found: History, wanted: History, first: float, last: float) -> None:
    report.equal(f"{name}: steps and evaluations", [len(found.loss), len(found.eval_loss)], [len(wanted.loss), 1])
    relative = [abs(f - w) / abs(w) for f, w in zip(found.loss, wanted.loss, strict=False)]
    report.at_most(f"{name}: first loss", relative[0], first)
    report.at_most(f"{name}: last loss", relative[-1], last)
    report.at_most(f"{name}: evaluation", abs(found.eval_loss[0] / wanted.eval_loss[0] - 1), last)
    report.at_most(f"{name}: last loss below the first, in nats", found.loss[-1] - found.loss[0], 0.0)
    report.note(f"{name} last loss", found.loss[-1])


def _check_generation(place: Place, report: Report) -> None:
    """Greedy tokens with the cache, without it, and those of the CPU."""
    cfg = paper_model("tiny", place.size(4, 2), vocab_size=512, hidden_size=place.size(256, 64))
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(0, cfg.vocab_size, (2, 12), generator=generator)
    tokens = {}
    for name, device, cache in (("cache", place.device, True), ("none", place.device, False), ("cpu", "cpu", True)):
        model = Transformer(cfg)
        init_parameters(model, seed=5)
        found = generate(model.to(device), prompts.to(device), 8, cache=cache)
        report.equal(f"device of what {name} generated", found.device.type, torch.device(device).type)
        tokens[name] = found.cpu()
    report.same_bits("tokens with and without cache", tokens["cache"], tokens["none"])
    report.same_bits("tokens of the device and of the CPU", tokens["cache"], tokens["cpu"])


def check_checkpoint(place: Place, report: Report) -> None:
    """Saved in the background while training goes on, loaded on the CPU, saved there and loaded on the device."""
    with alone(place.device), tempfile.TemporaryDirectory(prefix="moepp-proof-") as folder:
        groups = build_groups(RankLayout(1), place.device)
        on_host = replace(groups, device=torch.device("cpu"))
        engine, run = _trained(place, groups)
        saved = _numbers(engine)
        _save(report, Path(folder, "first"), engine, groups, run)
        moved = _numbers(engine)
        changed = any(not torch.equal(moved[name]["fp32"], saved[name]["fp32"]) for name in saved)
        report.expect("training went on during the save", changed, "other weights than the saved ones", changed)
        host_engine, _ = _trained(Place(on_host.device), on_host, steps=0)
        _load(Path(folder, "first"), host_engine, on_host)
        _expect_same(report, "loaded on the CPU", _numbers(host_engine), saved)
        _save(report, Path(folder, "second"), host_engine, on_host, None)
        _load(Path(folder, "second"), engine, groups)
        _expect_same(report, "loaded on the device again", _numbers(engine), saved)
        places = {parameter.device.type for parameter in engine.model.parameters()}
        report.equal("where the model lies", places, {place.device.type})


def _trained(place: Place, groups: ParallelGroups, steps: int = 2) -> tuple[NativeEngine, ModelRun]:
    cfg = paper_model("tiny", 2, hidden_size=64, vocab_size=256)
    run = ModelRun(place, cfg, torch.bfloat16, 2, 16)
    engine = NativeEngine(run.model, groups, OptimConfig(), 1)
    for _ in range(steps):
        _step(engine, run)
    return engine, run


def _step(engine: NativeEngine, run: ModelRun) -> None:
    engine.backward(run.loss())
    engine.step(1e-2)


def _numbers(engine: NativeEngine) -> Numbers:
    state = engine.read_state()
    return {name: {key: value.detach().cpu().clone() for key, value in entry.items()} for name, entry in state}


def _statistics() -> StepStats:
    return StepStats((0, 1), MoEConfig(8, 4, num_constant_experts=2, num_copy_experts=1, num_zero_experts=1))


def _save(report: Report, folder: Path, engine: NativeEngine, groups: ParallelGroups, run: ModelRun | None) -> None:
    """In the background, with a step meanwhile where there is something to run."""
    folder.mkdir()
    checkpointer = Checkpointer(CheckpointConfig(), groups, folder, new_cpu_group())
    checkpointer.save(engine, _statistics(), make_info(2), background=run is not None)
    if run is not None:
        _step(engine, run)
    checkpointer.close()
    report.equal(f"problems of the {folder.name} save", checkpointer.reports[-1].problems, [])


def _load(folder: Path, engine: NativeEngine, groups: ParallelGroups) -> None:
    [checkpoint] = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    load_training_state(checkpoint, engine, _statistics(), groups, saved_ranks=1)


def _expect_same(report: Report, name: str, found: Numbers, wanted: Numbers) -> None:
    report.equal(f"{name}: parameters", sorted(found), sorted(wanted))
    for parameter, entry in wanted.items():
        for key, value in entry.items():
            report.same_bits(f"{name}: {parameter}/{key}", found[parameter].get(key), value)


def check_engines(place: Place, report: Report) -> None:
    """Every engine and stage on the device against the native one there: 5 steps in float32."""
    setting = Setting(steps=5)
    device = place.device.type
    with alone(place.device):
        wanted = train(0, setting, Layout(device=device))
        for engine, zero in ENGINES:
            name = f"{engine}, ZeRO-{zero}"
            if engine == "deepspeed" and not is_installed("deepspeed"):
                report.skip(f"{name}: the package deepspeed is not installed")
                continue
            if engine == "fsdp" and (why := why_no_fsdp()):
                report.skip(f"{name}: {why}")
                continue
            found = train(0, setting, Layout(1, 1, engine, zero, device=device))
            report.at_most(f"{name}: deviation from native", deviation(wanted, found).worst, parity.TOLERANCE)
            report.note(name, deviation(wanted, found).worst)

"""A checkpoint saved in any layout by any engine loads in any other: masters and optimizer state, bit for bit.

The values are made up, another one for every element, so that nothing can be mistaken for anything else.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moepp.checkpoint import Checkpointer, CheckpointInfo, RunState, SavedLayout, load_training_state
from moepp.checkpoint.storage import TensorReader
from moepp.config import CheckpointConfig, Config, make_plan
from moepp.distributed import comm
from moepp.distributed.groups import ParallelGroups, new_cpu_group
from moepp.distributed.parameters import is_expert_parameter, tensor_dim
from moepp.engine.engine import Engine
from moepp.interop.weights import whole_parameters
from moepp.metrics.step_stats import StepStats
from moepp.model.init import random_stream
from moepp.training.build import build_engine, build_model
from moepp.training.pipeline import PipelineRunner
from moepp.training.runner import WholeModelRunner
from tests.parity import Layout, Setting, group_of, make_config, make_data

Tensor = torch.Tensor
KEYS = ("fp32", "exp_avg", "exp_avg_sq")
SETTING = Setting(model=(("num_layers", 4), ("num_heads", 4), ("num_kv_heads", 2)), precision="bf16")
FP32 = dataclasses.replace(SETTING, precision="fp32")
STEP = 7
PP = {"pipeline": 2, "micro_batch": 1}
# Each loads what the one before has saved, and saves it again.
CHAIN = [
    Layout(),
    Layout(2, 2, zero=1),
    Layout(4, 2, "fsdp", 3),
    Layout(2, 1, tensor=2),
    Layout(2, 1, **PP),
    Layout(2, 2, "deepspeed", 2),
    Layout(4, 2, zero=1, tensor=2, context=2, context_method="gather"),
    Layout(2, 1, **PP, chunks=2),
    Layout(4, 2, "fsdp", 3, **PP),
    Layout(4, 4, "deepspeed", 1),
    Layout(4, 2, zero=1, tensor=2, **PP),
    Layout(2, 1, "fsdp", 3, tensor=2),
    Layout(2, 2, context=2),
    Layout(1, 1, "fsdp", 3),
]


def value(name: str, key: str, shape: tuple[int, ...]) -> Tensor:
    """Return the whole tensor of one state: another one for every name and key."""
    return torch.randn(shape, generator=random_stream(f"{name} {key}"))


def held(name: str, whole: Tensor, groups: ParallelGroups) -> Tensor:
    """Return what a rank of the layout holds of it."""
    if is_expert_parameter(name):
        return whole.chunk(groups.ep_size)[groups.ep_rank]
    dim = tensor_dim(name)
    return whole if dim is None else whole.chunk(groups.tp_size, dim)[groups.tp_rank]


class Run:
    """One rank's engine, and what its state should be."""

    def __init__(self, setting: Setting, layout: Layout) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self.cfg: Config = make_config(setting, layout)
        self.groups = group_of(layout.ep, "cpu", layout.pipeline, layout.context, layout.tensor)
        self.plan = make_plan(self.cfg, self.groups.world_size)
        self.model = build_model(self.cfg, self.groups, comm.CommStats())
        self.engine: Engine = build_engine(self.cfg, self.plan, self.model, self.groups)
        model, moe = self.cfg.model, self.cfg.model.moe
        self.stats = StepStats(model.moe_layers, moe, self.model.moe_rows)

    def make_up(self) -> None:
        """Give the state its values."""
        shapes = whole_parameters(self.cfg.model)

        def fetch(name: str, buffers: dict[str, Tensor]) -> None:
            for key, buffer in buffers.items():
                buffer.copy_(torch.tensor(STEP) if key == "step" else self.expected(name, key, shapes))

        self.engine.write_state(fetch)

    def expected(self, name: str, key: str, shapes: dict[str, tuple[int, ...]]) -> Tensor:
        return held(name, value(name, key, shapes[name]), self.groups)

    def check(self) -> set[str]:
        """Compare state and weights with their values; return the names held here."""
        shapes, names = whole_parameters(self.cfg.model), set()
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[self.cfg.train.precision]
        for name, entry in self.engine.read_state():
            assert entry.keys() == {*KEYS, "step"} and float(entry["step"]) == STEP
            for key in KEYS:
                wanted = self.expected(name, key, shapes)
                assert torch.equal(entry[key].view(torch.int32), wanted.view(torch.int32)), (name, key)
            parameter = self.model.get_parameter(name)
            if self.cfg.engine.name != "fsdp":
                assert torch.equal(parameter, self.expected(name, "fp32", shapes).to(dtype)), name
            names.add(name)
        assert names == {name for name, _ in self.model.named_parameters()}
        return names

    def save(self, folder: str, step: int) -> None:
        checkpointer = Checkpointer(CheckpointConfig(keep=0), self.groups, Path(folder), new_cpu_group())
        layout = SavedLayout.of(self.cfg, self.plan)
        info = CheckpointInfo(step, step, layout, {}, {"torch": torch.__version__}, RunState.fresh(1))
        checkpointer.save(self.engine, self.stats, info, background=False)
        assert checkpointer.reports[-1].problems == []

    def load(self, path: str, saved_ranks: int) -> None:
        load_training_state(Path(path), self.engine, self.stats, self.groups, saved_ranks)


def _save_made_up(rank: int, setting: Setting, layout: Layout, folder: str, step: int) -> None:
    run = Run(setting, layout)
    run.make_up()
    run.check()
    run.save(folder, step)


def _load_and_save(
    rank: int, setting: Setting, layout: Layout, path: str, saved_ranks: int, folder: str, step: int
) -> set[str]:
    run = Run(setting, layout)
    run.load(path, saved_ranks)
    names = run.check()
    run.save(folder, step)
    return names


def _load(rank: int, setting: Setting, layout: Layout, path: str, saved_ranks: int) -> None:
    run = Run(setting, layout)
    run.load(path, saved_ranks)
    run.check()


def check_content(path: Path) -> None:
    """Every value is there once, under a name that tells no layout."""
    reader, shapes = TensorReader(path), whole_parameters(make_config(SETTING, Layout()).model)
    expected = {}
    for name, shape in shapes.items():
        for key in KEYS:
            whole = value(name, key, shape)
            if is_expert_parameter(name):
                expected |= {f"{name}.{e}/{key}": expert for e, expert in enumerate(whole)}
            else:
                expected[f"{name}/{key}"] = whole
    beside = {key for key in reader.shapes if key.startswith("rank-") or key.endswith("/step")}
    assert reader.shapes.keys() == expected.keys() | beside
    found = {key: torch.empty_like(tensor) for key, tensor in expected.items()}
    reader.fill(found)
    for key, tensor in expected.items():
        assert torch.equal(found[key].view(torch.int32), tensor.view(torch.int32)), key


def test_state_goes_unchanged_from_layout_to_layout(pools: Callable[[int], Any], tmp_path: Path) -> None:
    first, names = CHAIN[0], set(whole_parameters(make_config(SETTING, Layout()).model))
    pools(first.ranks).run(_save_made_up, SETTING, first, str(tmp_path), 1)
    check_content(tmp_path / "step-00000001")
    for step, (before, layout) in enumerate(itertools.pairwise(CHAIN), 2):
        path = tmp_path / f"step-{step - 1:08d}"
        held_by = pools(layout.ranks).run(_load_and_save, SETTING, layout, str(path), before.ranks, str(tmp_path), step)
        assert set().union(*held_by) == names, layout
        check_content(tmp_path / f"step-{step:08d}")


@pytest.mark.parametrize(
    "layout", [Layout(2, 2, "deepspeed", 0), Layout(2, 2, zero=1), Layout(2, 2, "fsdp", 3)], ids=str
)
def test_fp32_masters_are_the_weights_and_travel_as_well(pools, tmp_path, layout):
    pools(2).run(_save_made_up, FP32, layout, str(tmp_path), 1)
    check_content(tmp_path / "step-00000001")
    for other in (Layout(2, 2, zero=1), Layout(2, 1, tensor=2)):
        pools(2).run(_load, FP32, other, str(tmp_path / "step-00000001"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", CHAIN, ids=str)
def test_every_pair_of_layouts(pools, tmp_path, layout):
    pools(layout.ranks).run(_save_made_up, SETTING, layout, str(tmp_path), 1)
    for other in CHAIN:
        pools(other.ranks).run(_load, SETTING, other, str(tmp_path / "step-00000001"), layout.ranks)


RESUMED = [
    Layout(2, 2, zero=1, micro_batch=2),
    Layout(2, 2, "fsdp", 3, micro_batch=2),
    Layout(4, 2, zero=1, tensor=2),
    Layout(2, 1, **PP, zero=1),
    Layout(4, 2, "fsdp", 3, **PP),
]


def _resume(rank: int, setting: Setting, layout: Layout, folder: str) -> None:
    """Six steps, and three in a fresh engine after the first three: the same bits."""
    whole, first, second = (Run(setting, layout) for _ in range(3))
    _steps(whole, range(6))
    _steps(first, range(3))
    first.save(folder, 1)
    second.load(f"{folder}/step-00000001", layout.ranks)
    _steps(second, range(3, 6))
    states = [
        {f"{name} {key}": x.detach().clone() for name, entry in run.engine.read_state() for key, x in entry.items()}
        for run in (whole, second)
    ]
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key


def _steps(run: Run, steps: range) -> None:
    data, plan = make_data(run.cfg, run.plan, run.groups.data_rank), run.plan
    if run.cfg.parallel.pipeline > 1:
        runner = PipelineRunner(run.model, run.engine, run.groups, run.cfg, plan, comm.CommStats())
    else:
        runner = WholeModelRunner(run.model, run.engine)
    run.model.train()
    for step in steps:
        batches = [data.train_batch(step, micro_step) for micro_step in range(plan.accumulation_steps)]
        runner.train(batches, None, run.stats)
        assert not run.engine.step(0.01).skipped


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("layout", RESUMED, ids=str)
def test_resumed_run_goes_on_bit_for_bit(pools, tmp_path, layout, precision):
    setting = dataclasses.replace(SETTING, precision=precision)
    pools(layout.ranks).run(_resume, setting, layout, str(tmp_path))

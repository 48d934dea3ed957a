"""ZeRO stage 1 of the native engine: the numbers of stage 0, a share of the memory, weights that come in time."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from moepp.config import OptimConfig
from moepp.distributed import comm
from moepp.engine.native import NativeEngine
from moepp.engine.zero import ShardedGroup
from tests.parity import Layout, Setting, deviation, group_of, train

Tensor = torch.Tensor
WIDTHS = (41, 7, 33, 90, 5, 1)  # of weights with three rows: no size that ranks could share


class Layer(nn.Module):
    def __init__(self, width: int, generator: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, width, generator=generator).to(dtype))
        self.bias = nn.Parameter(torch.randn(3, generator=generator).to(dtype))

    def forward(self, total: Tensor, factor: float) -> Tensor:
        row = torch.arange(1.0, self.weight.shape[1] + 1)
        return total * factor / 2 + (self.weight.float() * row).sum() / 100 + (self.bias.float() ** 2).sum() / 10


class Chain(nn.Module):
    """Layers one after the other, with odd sizes, one in its own parameter outside of them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(11, generator=generator).to(dtype))
        self.layers = nn.ModuleList(Layer(width, generator, dtype) for width in WIDTHS)

    def forward(self, factor: float) -> Tensor:
        total = self.first.float().prod().sin()
        for layer in self.layers:
            total = layer(total, factor)
        return total


def _engine(dtype: torch.dtype, optimizer: str, bucket_elements: int, zero_stage: int) -> NativeEngine:
    optim = OptimConfig(name=optimizer, weight_decay=0.1, grad_clip=0.02)
    return NativeEngine(Chain(dtype), group_of(1), optim, 2, zero_stage, bucket_elements)


def _step(engine: NativeEngine, step: int, times: float = 1.0, update: bool = True) -> Any:
    rank = comm.rank()
    for factor in (1.0 + rank, 0.5 - rank / 10 + step / 7):
        engine.backward(engine.model(factor) * times)
    return engine.step(0.03, update)


def _state(engine: NativeEngine) -> dict[str, dict[str, Tensor]]:
    return {name: {k: v.detach().clone() for k, v in entry.items()} for name, entry in engine.read_state()}


def _compare_with_stage_0(rank: int, dtype: torch.dtype, optimizer: str, bucket_elements: int) -> None:
    plain, sharded = (_engine(dtype, optimizer, bucket_elements, stage) for stage in (0, 1))
    for step in range(6):
        results = [_step(engine, step, math.inf if step == 3 else 1.0, step != 2) for engine in (plain, sharded)]
        assert [result.skipped for result in results] == [step in (2, 3)] * 2
        if step != 3:
            assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-6)
            assert results[0].grad_norm > 0.02, "not clipped"
    wanted, found = _state(plain), _state(sharded)
    assert wanted.keys() == found.keys()
    for name, entry in wanted.items():
        assert entry.keys() == found[name].keys()
        for key, tensor in entry.items():
            # Fused AdamW may round the ends of a tensor and its middle in two ways.
            torch.testing.assert_close(found[name][key], tensor, rtol=1e-6, atol=1e-7, msg=f"{name} {key}")
    sharded._gather.finish()
    for name, parameter in sharded.model.named_parameters():
        assert torch.equal(parameter, found[name]["fp32"].to(dtype)), name


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_updates_are_those_of_stage_0_for_odd_sizes(pools, ranks):
    for dtype in (torch.float32, torch.bfloat16):
        for optimizer in ("sgd", "adamw"):
            for bucket_elements in (1, 200, 10**6) if ranks == 2 else (200,):
                pools(ranks).run(_compare_with_stage_0, dtype, optimizer, bucket_elements)


SETTINGS = [Setting("sgd"), Setting("adamw", one_sided=True)]


# Each layout under one optimizer; under the other, where most of it is the same, it is slow.
STAGE_0_CASES = [
    pytest.param(setting, layout, marks=() if is_quick else pytest.mark.slow, id=f"{setting.optimizer}-{layout}")
    for setting, quick in zip(SETTINGS, ((True, False, True), (False, True, False)), strict=True)
    for layout, is_quick in zip(
        (Layout(2, 2), Layout(4, 2), Layout(4, 1, micro_batch=1, recompute=True)), quick, strict=True
    )
]


@pytest.mark.parametrize(("setting", "layout"), STAGE_0_CASES)
def test_twenty_clipped_steps_measure_what_stage_0_does(pools, setting, layout):
    wanted = pools(layout.ranks).run(train, setting, layout)
    sharded = Layout(**{**vars(layout), "zero": 1})
    for one, other in zip(wanted, pools(layout.ranks).run(train, setting, sharded), strict=True):
        # Of more than two numbers the two collectives may round the sum in different order.
        assert deviation(one, other).worst < (1e-7 if layout.ranks == 2 else 1e-6)


def _bytes_held(rank: int, dtype: torch.dtype, optimizer: str, zero_stage: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer; parameters; bytes of padding that a rank may have."""
    engine = _engine(dtype, optimizer, 200, zero_stage)
    _step(engine, 0)
    tensors = [*engine.model.parameters(), *(flat.grad for flat in engine._flat)]
    for flat in engine._flat:
        tensors += [*flat.masters, *(flat._weights if isinstance(flat, ShardedGroup) else ())]
    tensors += [x for entry in engine._optimizer.state.values() for key, x in entry.items() if key != "step"]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    count = sum(parameter.numel() for parameter in engine.model.parameters())
    views = sum(len(flat.parameters) * flat.ALIGN + len(flat.spans) * comm.size() for flat in engine._flat)
    return sum(storages.values()), count, views


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_each_rank_holds_a_share_of_masters_and_moments(pools, ranks, dtype, optimizer):
    is_bf16, moments = dtype == torch.bfloat16, 8 if optimizer == "adamw" else 0
    for held, count, padding in pools(ranks).run(_bytes_held, dtype, optimizer, 1):
        whole, shared = (2 if is_bf16 else 4) + 4, (4 if is_bf16 else 0) + moments
        formula = whole * count + shared * count / ranks
        assert formula <= held <= formula + padding * (whole + shared)
    for held, count, _ in pools(ranks).run(_bytes_held, dtype, optimizer, 0):
        assert held == (whole + shared) * count


def _watch_gathers(rank: int) -> tuple[list[str], list[str]]:
    """What is gathered when: order of the starts and of the waits, by first parameter of the bucket."""
    engine = _engine(torch.bfloat16, "adamw", 1, 1)
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    started, waited = [], []
    right = ShardedGroup.start_gather

    class Spy:
        def __init__(self, name: str, pending: comm.Pending) -> None:
            self.name, self.pending = name, pending

        def wait(self) -> None:
            waited.append(self.name)
            self.pending.wait()

    def start(group: ShardedGroup, index: int) -> Any:
        name = names[id(group.parameters[group.spans[index].first])]
        started.append(name)
        return Spy(name, right(group, index))

    with patch.object(ShardedGroup, "start_gather", start):
        _step(engine, 0)
        waited.append("end of step")
        for index, layer in enumerate(engine.model.layers):
            layer.register_forward_hook(lambda *_, index=index: waited.append(f"forward {index}"))
        engine.model(1.0)
    return started, waited


def test_weights_of_layers_are_gathered_while_the_next_forward_runs(pool_2):
    for started, waited in pool_2.run(_watch_gathers):
        expected = ["first", *(f"layers.{i}.{name}" for i in range(len(WIDTHS)) for name in ("weight", "bias"))]
        assert started == expected
        assert waited[:2] == ["first", "end of step"]
        in_forward = [[f"layers.{i}.weight", f"layers.{i}.bias", f"forward {i}"] for i in range(len(WIDTHS))]
        assert waited[2:] == [name for layer in in_forward for name in layer]


def _scatter_bytes(rank: int) -> set[str]:
    """Which sums a step makes."""
    used = set()
    with (
        patch.object(comm, "start_all_reduce_sum", lambda *args: used.add("all-reduce")),
        patch.object(comm, "start_reduce_scatter_sum", lambda *args: used.add("reduce-scatter") or comm.Pending(None)),
    ):
        _step(_engine(torch.float32, "sgd", 200, 1), 0)
    return used


def test_gradients_are_reduce_scattered(pool_2):
    assert pool_2.run(_scatter_bytes) == [{"reduce-scatter"}] * 2

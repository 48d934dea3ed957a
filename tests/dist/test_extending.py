"""Parts that are registered outside the package, those of docs/examples: the oracle, the trainer, the layouts."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import docs.examples.negate_expert
import docs.examples.scale_expert
import docs.examples.small_parts  # noqa: F401
from docs.examples.bias_router import BiasRouter
from moepp import MoEConfig
from moepp.checkpoint.state import _require_same
from moepp.distributed import comm
from moepp.distributed.groups import ParallelGroups
from moepp.errors import TrainingError
from moepp.model.accounting import count_parameters
from moepp.model.transformer import Transformer
from moepp.moe import MoELayer
from moepp.moe.experts import ExpertKind
from moepp.registry import EXPERT_KINDS
from tests.dist import WorkerFailure, WorkerPool, subgroups
from tests.moe_cases import LEAST_MARGIN, Case, Observed, assert_agrees, expect, run_layer
from tests.parity import TOLERANCE, Layout, Setting, deviation, group_of, make_config, train

RATE = 0.01
BIAS = {"router": "bias", "gate_normalization": "none", "router_options": {"bias_update_rate": RATE}}
PARTS: dict[str, dict[str, Any]] = {
    "negate": {"extra_experts": {"negate": 2}},
    "scale": {"extra_experts": {"scale": 3}},
    "both": {"extra_experts": {"scale": 1, "negate": 1}},
    "bias": BIAS,
    "everything": BIAS | {"extra_experts": {"scale": 2, "negate": 1}},
    "topk_sigmoid": {"gate_normalization": "topk_sigmoid"},
    "ffn_only": {"balance_rule": "ffn_only"},
}
TALLY: dict[str, dict[str, Any]] = {"tally": {"extra_experts": {"tally": 2}}}


def _case(part: str, dtype: torch.dtype, ep_size: int) -> Case:
    cfg = MoEConfig(
        num_ffn_experts=4,
        num_constant_experts=1,
        num_copy_experts=1,
        num_zero_experts=1,
        ffn_hidden_size=3,
        top_k=3,
        capacity_factor=0.8,
        balance_loss_weight=0.3,
        **PARTS[part],
    )
    for seed in range(100):
        case = Case(cfg, tokens=(9,) * ep_size, ep_size=ep_size, seed=seed, dtype=dtype)
        if min(expected.reference.margin for expected in expect(case)) > 10 * LEAST_MARGIN[dtype]:
            return case
    raise AssertionError(f"no seed of {part} decides its routing by more than rounding")


def _run_cases(rank: int, cases: list[Case]) -> list[Observed]:
    return [run_layer(case, rank, ep_group=subgroups(case.ep_size)) for case in cases]


@pytest.mark.parametrize("ep_size", [1, 2])
def test_every_part_agrees_with_the_oracle_forward_and_backward(
    pools: Callable[[int], WorkerPool], ep_size: int
) -> None:
    cases = [_case(part, dtype, ep_size) for part in PARTS for dtype in (torch.float64, torch.float32)]
    results = pools(ep_size).run(_run_cases, cases)
    for number, case in enumerate(cases):
        for rank, expected in enumerate(expect(case)):
            assert_agrees(case, results[rank][number], expected, rank)


def test_the_cases_use_what_they_are_about() -> None:
    for part in PARTS:
        case = _case(part, torch.float64, 1)
        shares = expect(case)[0].reference.stats
        assert all(shares[f"share_{kind}"] > 0 for kind in case.cfg.extra_experts), part


def _setting(part: str, **model: Any) -> Setting:
    return Setting("adamw", moe=tuple((PARTS | TALLY)[part].items()), model=tuple(model.items()), steps=6)


@pytest.mark.parametrize("part", ["both", "everything", "topk_sigmoid", "ffn_only"])
def test_every_part_trains_alike_on_every_layout(pool_1: WorkerPool, pool_2: WorkerPool, part: str) -> None:
    [alone] = pool_1.run(train, _setting(part), Layout())
    for layout in (
        Layout(2, 2, micro_batch=2, recompute=True),
        Layout(2, 1, "deepspeed", 1, micro_batch=2),
        Layout(2, 2, "deepspeed", 2),
        Layout(2, micro_batch=2, pipeline=2),
    ):
        [spread, _] = pool_2.run(train, _setting(part), layout)
        assert deviation(alone, spread).worst < TOLERANCE, f"{layout}: {deviation(alone, spread)}"


class _Watch:
    """What the layers said they chose, and the biases that follow from it, computed without the router's code."""

    def __init__(self, model: Transformer, groups: ParallelGroups, forwards_per_step: int) -> None:
        self.routers = [layer.moe.router for layer in model.layers]
        self.groups, self.forwards_per_step = groups, forwards_per_step
        self.loads: list[list[list[float]]] = [[] for _ in self.routers]
        for seen, layer in zip(self.loads, model.layers, strict=True):
            layer.moe.register_forward_hook(lambda module, _args, out, seen=seen: self._note(module, out, seen))

    def _note(self, module: MoELayer, out: Any, seen: list[list[float]]) -> None:
        if module.training and torch.is_grad_enabled():  # neither evaluation nor the pass that only counts
            seen.append(out.record.load_E.tolist())

    def compare(self) -> None:
        everyone = comm.gather_objects(self.loads, self.groups.world)
        for layer, router in enumerate(self.routers):
            bias = [0.0] * len(router.bias)
            for step in range(len(self.loads[layer]) // self.forwards_per_step):
                at = slice(step * self.forwards_per_step, (step + 1) * self.forwards_per_step)
                forwards = [load for loads in everyone for load in loads[layer][at]]
                load = [sum(column) for column in zip(*forwards, strict=True)]
                mean = sum(load) / len(load)
                bias = [b + RATE * ((mean > n) - (mean < n)) for b, n in zip(bias, load, strict=True)]
            assert any(bias), "no bias moved"
            torch.testing.assert_close(router.bias.tolist(), bias, rtol=0, atol=1e-6)


@EXPERT_KINDS.register("tally")
class Tally(ExpertKind):
    """E(x) = 0; counts how often each of these experts was chosen in all steps."""

    updates_after_step = True
    count: torch.Tensor

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__(num_experts, hidden_size)
        self.register_buffer("count", torch.zeros(num_experts, dtype=torch.int64))

    def reset_buffers(self) -> None:
        self.count.zero_()

    def forward(self, x_TD: torch.Tensor, gates_TZ: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x_TD)

    def after_optimizer_step(self, load_Z: torch.Tensor) -> None:
        self.count += load_Z.to(torch.int64)


_COUNTS: dict[str, Any] = {}


@contextlib.contextmanager
def keep_counts(model: Transformer, groups: ParallelGroups) -> Iterator[None]:
    """Counts of the kind of every layer that this rank holds, and what the layers chose while they trained."""
    chosen = {row: torch.zeros(2, dtype=torch.int64) for row in model.moe_rows}

    def note(row: int, layer: MoELayer, out: Any) -> None:
        if layer.training and torch.is_grad_enabled():
            chosen[row] += out.record.load_E[layer.cfg.kind_slices["tally"]]

    for row, layer in zip(model.moe_rows, model.moe_layers, strict=True):
        layer.register_forward_hook(lambda layer, _args, out, row=row: note(row, layer, out))
    yield
    counts = {
        row: layer.zero_computation.tally.count for row, layer in zip(model.moe_rows, model.moe_layers, strict=True)
    }
    _COUNTS.update(counts=counts, chosen=chosen)


def _last_counts(rank: int) -> dict[str, Any]:
    return _COUNTS


def test_state_of_an_expert_kind_follows_the_load_of_all_ranks(pool_1: WorkerPool, pool_2: WorkerPool) -> None:
    pool_1.run(train, _setting("tally"), Layout(), keep_counts)
    [alone] = pool_1.run(_last_counts)
    wanted = alone["chosen"]
    assert all((count > 0).all() for count in wanted.values()) and len(wanted) > 1
    for row, count in alone["counts"].items():
        assert torch.equal(count, wanted[row]), row
    for layout in (Layout(2, 2, micro_batch=2, recompute=True), Layout(2, micro_batch=2, pipeline=2)):
        pool_2.run(train, _setting("tally"), layout, keep_counts)
        for found in pool_2.run(_last_counts):
            assert found["counts"]
            for row, count in found["counts"].items():
                assert torch.equal(count, wanted[row]), (layout, row)


_BIASES: dict[str, list[list[float]]] = {}


@contextlib.contextmanager
def watch_1(model: Transformer, groups: ParallelGroups) -> Iterator[None]:
    """One micro-batch per step and rank."""
    watch = _Watch(model, groups, 1)
    yield
    watch.compare()
    _BIASES["last"] = [router.bias.tolist() for router in watch.routers]


@contextlib.contextmanager
def watch_2(model: Transformer, groups: ParallelGroups) -> Iterator[None]:
    """Two micro-batches per step and rank."""
    watch = _Watch(model, groups, 2)
    yield
    watch.compare()
    _BIASES["last"] = [router.bias.tolist() for router in watch.routers]


@contextlib.contextmanager
def only_keep(model: Transformer, groups: ParallelGroups) -> Iterator[None]:
    """For layouts in which a layer is computed again."""
    yield
    _BIASES["last"] = [layer.moe.router.bias.tolist() for layer in model.layers]


@contextlib.contextmanager
def watch_updates_twice(model: Transformer, groups: ParallelGroups) -> Iterator[None]:
    """A mistake: every step counts double."""
    original = BiasRouter.after_optimizer_step

    def twice(router: BiasRouter, load_E: torch.Tensor) -> None:
        original(router, load_E)
        original(router, load_E)

    BiasRouter.after_optimizer_step = twice
    try:
        with watch_1(model, groups):
            yield
    finally:
        BiasRouter.after_optimizer_step = original


@contextlib.contextmanager
def watch_own_load(model: Transformer, groups: ParallelGroups) -> Iterator[None]:
    """A mistake: one update with the load of half of the experts."""
    original = BiasRouter.after_optimizer_step
    BiasRouter.after_optimizer_step = lambda router, load_E: original(
        router, load_E * (torch.arange(len(load_E)) < len(load_E) // 2)
    )
    try:
        with watch_1(model, groups):
            yield
    finally:
        BiasRouter.after_optimizer_step = original


def _last_biases(rank: int) -> list[list[float]]:
    return _BIASES["last"]


def test_biases_follow_the_load_of_all_ranks_and_micro_batches(pool_1: WorkerPool, pool_2: WorkerPool) -> None:
    pool_1.run(train, _setting("everything"), Layout(), watch_1)
    [wanted] = pool_1.run(_last_biases)
    for layout, watch in (
        (Layout(2, 2), watch_1),
        (Layout(2, 2, micro_batch=2), watch_2),
        (Layout(2, 1, "deepspeed", 1, micro_batch=2), watch_2),
        (Layout(2, 2, "deepspeed", 2, micro_batch=2, recompute=True), only_keep),
    ):
        pool_2.run(train, _setting("everything"), layout, watch)
        assert pool_2.run(_last_biases) == [wanted, wanted], layout


@pytest.mark.parametrize("mistake", [watch_updates_twice, watch_own_load])
def test_a_wrong_update_is_noticed(pool_1: WorkerPool, mistake: Callable[..., Any]) -> None:
    with pytest.raises(WorkerFailure, match="not close"):
        pool_1.run(train, _setting("everything"), Layout(), mistake)


@contextlib.contextmanager
def skip_the_second_step(model: Transformer, groups: ParallelGroups) -> Iterator[None]:
    """The loss of one step is not finite; the biases that it found must be there in the next."""
    loss, biases = model.loss, []

    def broken(*args: Any) -> Any:
        biases.append([router.bias.tolist() for router in model.routers])
        out = loss(*args)
        return dataclasses.replace(out, ce_sum=out.ce_sum * math.inf) if len(biases) == 2 else out

    model.loss = broken
    yield
    assert biases[0] != biases[1] == biases[2] != biases[3], "a skipped step changed a bias, or one that was taken none"


def test_skipped_step_updates_no_router(pool_1: WorkerPool) -> None:
    pool_1.run(train, dataclasses.replace(_setting("bias"), steps=4), Layout(), skip_the_second_step)


def _save_differing_buffers(rank: int) -> None:
    _require_same({"same/buffer": torch.ones(2), "mine/buffer": torch.tensor([rank])}, group_of(1))


def test_buffer_that_differs_between_ranks_is_not_saved(pool_2: WorkerPool) -> None:
    for message in pool_2.run(_save_differing_buffers, raises=TrainingError):
        assert "buffer mine differs" in message


def test_parameters_are_counted() -> None:
    plain = count_parameters(make_config(Setting(), Layout()).model)
    cfg = make_config(_setting("everything"), Layout()).model
    more = count_parameters(cfg)
    layers, width = len(cfg.moe_layers), cfg.hidden_size
    assert more.registered_experts == layers * 2 * width
    # The buffers are none; three experts more widen the router and its residual map.
    n = plain_experts = make_config(Setting(), Layout()).model.moe.num_experts
    n += 3
    assert more.router - plain.router == layers * (3 * width + n**2 - plain_experts**2)
    with torch.device("meta"):
        assert more.total == sum(parameter.numel() for parameter in Transformer(cfg).parameters())

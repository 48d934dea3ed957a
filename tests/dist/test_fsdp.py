"""ZeRO-3 by FSDP2: the numbers of one process in every layout that it goes with, and what would break them."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import weakref
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor

from moepp.config import make_plan
from moepp.distributed import comm
from moepp.distributed.groups import ParallelGroups
from moepp.distributed.layout import Layout as RankLayout
from moepp.distributed.parameters import DENSE, Placement
from moepp.engine import fsdp
from moepp.model.transformer import Transformer
from moepp.training.build import build_engine, build_model
from moepp.training.estimate import stage_costs
from moepp.training.trainer import Trainer
from tests.parity import REFERENCE, TOLERANCE, History, Layout, Setting, deviation, group_of, make_config, train

SETTING = Setting("sgd", model=(("num_layers", 4), ("num_heads", 4), ("num_kv_heads", 2)))
PP = {"micro_batch": 1, "pipeline": 2}
LAYOUTS = [
    Layout(2, 2, "fsdp", 3),
    Layout(4, 2, "fsdp", 3, micro_batch=1, recompute=True),
    Layout(4, 4, "fsdp", 3, tensor=2, context=2, context_method="gather"),
    Layout(4, 2, "fsdp", 3, exchange_chunks=2, tensor=2),
    Layout(2, 1, "fsdp", 3, context=2),
    Layout(4, 2, "fsdp", 3, **PP),
    Layout(4, 2, "fsdp", 3, **PP, chunks=2, recompute=True),
    Layout(4, 2, "fsdp", 3, **PP, tensor=2),
    Layout(4, 2, "fsdp", 3, **PP, context=2),
    Layout(4, 1, "fsdp", 3, micro_batch=1, pipeline=4),  # stages in the middle, with neither end
]
DEFAULT = (1, 3, 6, 9)


@pytest.fixture(scope="module")
def reference(pools) -> History:
    return pools(1).run(train, SETTING, REFERENCE)[0]


def _memory_at_start(rank: int, layout: Layout, precision: str) -> tuple[int, int]:
    """Return the most bytes of whole weights and shares together until the engine is there, and what is foretold."""
    cfg, groups = make_config(SETTING, layout), group_of(layout.ep)
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, precision=precision))
    plan, held = make_plan(cfg, groups.world_size), []
    made, shard = Transformer.to_empty, fsdp.fully_shard
    whole: list[weakref.ref[torch.nn.Parameter]] = []

    def alive() -> int:
        return sum(parameter.nbytes for ref in whole if (parameter := ref()) is not None)

    def to_empty(model: Transformer, **keywords: Any) -> Transformer:
        result = made(model, **keywords)
        whole.extend(weakref.ref(parameter) for parameter in model.parameters())
        held.append(alive())
        return result

    def cut(module: torch.nn.Module, **keywords: Any) -> Any:
        before = alive()  # until all of the module are cut
        result = shard(module, **keywords)
        shares = [parameter.to_local() for parameter in model.parameters() if isinstance(parameter, DTensor)]
        held.append(before + sum(share.nbytes for share in shares))
        return result

    with patch.object(Transformer, "to_empty", to_empty), patch.object(fsdp, "fully_shard", cut):
        model = build_model(cfg, groups, comm.CommStats())
        build_engine(cfg, plan, model, groups)
    return max(held), stage_costs(cfg, plan, RankLayout.of(cfg.parallel, groups.world_size))[0].at_start


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_start_holds_all_weights_once_in_their_precision(pools, precision):
    for most, foretold in pools(2).run(_memory_at_start, Layout(2, 2, "fsdp", 3), precision):
        assert most == pytest.approx(foretold, rel=0.02)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=() if i in DEFAULT else pytest.mark.slow) for i, x in enumerate(LAYOUTS)],
    ids=str,
)
def test_twenty_clipped_steps_measure_what_one_process_does(pools, reference, layout):
    observed = pools(layout.ranks).run(train, SETTING, layout)
    for history in observed:
        assert deviation(observed[0], history).worst == 0, "ranks disagree"
    assert deviation(reference, observed[0]).worst < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*LAYOUTS[:3], LAYOUTS[5]], ids=str)
def test_adam_with_one_sided_routing(pools, layout):
    setting = dataclasses.replace(SETTING, optimizer="adamw", one_sided=True)
    [wanted] = pools(1).run(train, setting, REFERENCE)
    assert deviation(wanted, pools(layout.ranks).run(train, setting, layout)[0]).worst < TOLERANCE


def gradients_divided_by_fsdp_too(model: Transformer, groups: ParallelGroups) -> Any:
    return patch.object(FSDPModule, "set_gradient_divide_factor", lambda *args: None)


def experts_shared_by_the_wrong_ranks(model: Transformer, groups: ParallelGroups) -> Any:
    right = Placement.group
    return patch.object(Placement, "group", lambda self, groups: right(DENSE, groups))


@contextlib.contextmanager
def norm_divided_by_the_ranks(model: Transformer, groups: ParallelGroups) -> Iterator[None]:
    right = fsdp.global_norm
    with patch.object(
        fsdp, "global_norm", lambda squares, *args: right([(s, groups.edp_size) for s, _ in squares], *args)
    ):
        yield


@pytest.mark.parametrize(
    ("sabotage", "layout"),
    [
        (gradients_divided_by_fsdp_too, Layout(2, 1, "fsdp", 3)),
        (norm_divided_by_the_ranks, Layout(2, 1, "fsdp", 3)),
        pytest.param(experts_shared_by_the_wrong_ranks, Layout(4, 2, "fsdp", 3), marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_comparison_notices(pools, reference, sabotage, layout):
    observed = pools(layout.ranks).run(train, SETTING, layout, sabotage)[0]
    assert deviation(reference, observed).worst > 10 * TOLERANCE


def _held(rank: int, layout: Layout) -> tuple[int, int]:
    held = []

    def count(trainer: Trainer) -> None:
        trainer.engine._forget_gathered()  # evaluation leaves embedding and output layer gathered
        parameters = list(trainer.model.parameters())
        assert all(isinstance(parameter, DTensor) and parameter.dtype == torch.float32 for parameter in parameters)
        shares = [parameter.to_local() for parameter in parameters if isinstance(parameter, DTensor)]
        held.append(sum(share.numel() for share in shares))
        held.append(sum(parameter.numel() for parameter in parameters))

    setting = dataclasses.replace(SETTING, steps=1, precision="bf16")
    train(rank, setting, layout, inspect=count)
    return held[0], held[1]


@pytest.mark.parametrize(
    "layout",
    [Layout(2, 1, "fsdp", 3), pytest.param(Layout(4, 1, "fsdp", 3, **PP, chunks=2), marks=pytest.mark.slow)],
    ids=str,
)
def test_weights_are_shares_between_steps(pools, layout):
    for own, whole in pools(layout.ranks).run(_held, layout):
        assert own == pytest.approx(whole / 2, rel=0.1)


def _gathers(rank: int, layout: Layout) -> list[str]:
    """What one step gathers and computes, in the host's order: "gather 1", "forward 1", "backward 1"."""
    log: list[str] = []
    unshard, pre_backward = FSDPParamGroup.unshard, FSDPState._pre_backward

    def note(what: str, group: FSDPParamGroup) -> None:
        found = re.search(r"layers\.(\d+)", str(group._module_fqn))
        if found and group._param_group_index == 0:
            log.append(f"{what} {found[1]}")

    def gather(self: FSDPParamGroup, async_op: bool = False) -> None:
        if self._all_gather_result is None and not self.is_unsharded:
            note("gather", self)
        unshard(self, async_op)

    def go_back(self: FSDPState, grad: torch.Tensor) -> torch.Tensor:
        is_first = self._training_state.name != "PRE_BACKWARD"  # it is called for every output
        grad = pre_backward(self, grad)
        if is_first:
            for group in self._fsdp_param_groups:
                note("backward", group)
        return grad

    def inspect(trainer: Trainer) -> None:
        for number, layer in enumerate(trainer.model.layers):
            layer.register_forward_pre_hook(lambda *_, number=number: log.append(f"forward {number}"))
        batches = trainer.batches.read(0, False)  # again: the run is at its end
        with (
            patch.object(FSDPParamGroup, "unshard", gather),
            patch.object(FSDPState, "_pre_backward", go_back),
            patch.object(trainer.batches, "read", lambda *_: batches),
        ):
            log.clear()
            trainer.train_step()

    train(rank, dataclasses.replace(SETTING, steps=2), layout, inspect=inspect)
    return log


@pytest.mark.parametrize(
    "layout", [Layout(2, 1, "fsdp", 3, micro_batch=2), Layout(4, 1, "fsdp", 3, **PP)], ids=lambda x: f"PP{x.pipeline}"
)
def test_a_layer_is_gathered_before_its_neighbour_computes(pools, layout):
    """Of every layer but a stage's first in forward and its last in backward; and nothing is gathered for nothing."""
    for log in pools(layout.ranks).run(_gathers, layout):
        layers = sorted({int(line.split()[1]) for line in log if line.startswith("forward")})
        forwards, backwards, gathers = (sum(kind in line for line in log) for kind in ("forward", "backward", "gather"))
        assert forwards >= backwards > 0 and gathers <= forwards + backwards
        for kind, neighbours in (("forward", layers[1:]), ("backward", layers[:-1])):
            for layer in neighbours:
                before = layer - 1 if kind == "forward" else layer + 1
                for place, line in enumerate(log):
                    if line == f"{kind} {layer}":
                        start = max(p for p, one in enumerate(log[:place]) if one == f"{kind} {before}")
                        assert f"gather {layer}" not in log[start:place], (kind, layer, log)

"""Loss and gradient norm do not depend on the layout: processes, EP, engine, ZeRO stage, accumulation, recompute.

The reference is one process with the native engine, which tests/dist/test_parity_reference.py compares with plain
PyTorch. That these comparisons notice mistakes is shown in tests/dist/test_parity_notices.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moepp.config import make_plan
from tests.dist import WorkerPool
from tests.parity import (
    EVAL_BATCHES,
    REFERENCE,
    STEPS,
    TOLERANCE,
    History,
    Layout,
    Setting,
    deviation,
    layouts,
    make_config,
    make_data,
    train,
)

Pools = Callable[[int], WorkerPool]
SETTINGS = [Setting(optimizer, one_sided) for optimizer in ("sgd", "adamw") for one_sided in (False, True)]
# Choices of experts must not hang on rounding, which moves the router's logits by about 1e-6 within 20 steps.
LEAST_MARGIN = 5e-6


def name_of(value: Any) -> str | None:
    if isinstance(value, Setting):
        return f"{value.optimizer}-{'one-sided' if value.one_sided else 'learnt'}"
    return str(value) if isinstance(value, Layout) else None


@pytest.fixture(scope="module")
def reference(pools: Pools) -> Callable[..., History]:
    """``reference(setting)``: what one process measures, run once."""
    found: dict[tuple[Setting, Layout], History] = {}

    def get(setting: Setting, layout: Layout = REFERENCE) -> History:
        if (setting, layout) not in found:
            found[setting, layout] = pools(layout.ranks).run(train, setting, layout)[0]
        return found[setting, layout]

    return get


def check(pools: Pools, wanted: History, setting: Setting, layout: Layout) -> list[History]:
    """Every rank of ``layout`` measures the same, and what ``wanted`` says; returns what the ranks measured."""
    observed = pools(layout.ranks).run(train, setting, layout)
    for history in observed:
        assert deviation(observed[0], history).worst == 0, f"ranks disagree: {setting}, {layout}"
    found = deviation(wanted, observed[0])
    assert found.worst < TOLERANCE, f"{found} of {setting}, {layout}"
    return observed


def all_cases() -> list[tuple[Setting, Layout]]:
    """The whole cross product, the reference itself left out."""
    switches = list(itertools.product((False, True), repeat=2))
    chosen = [layout for accumulate, recompute in switches for layout in layouts(accumulate, recompute)]
    return [(setting, layout) for layout in chosen for setting in SETTINGS if layout != REFERENCE]


def together(setting: Setting, layout: Layout, at_once: int) -> set[tuple[Any, ...]]:
    """The combinations of ``at_once`` choices that a case shows to work together."""
    choices = {
        "place": (layout.ranks, layout.ep),
        "engine": (layout.engine, layout.zero),
        "accumulates": layout.micro_batch is not None,
        "recompute": layout.recompute,
        "optimizer": setting.optimizer,
        "one_sided": setting.one_sided,
    }
    return set(itertools.combinations(choices.items(), at_once))


def covering_sample(cases: list[tuple[Setting, Layout]], at_once: int) -> set[tuple[Setting, Layout]]:
    """A few cases in which all choices occur together that can, two or three at once (greedy, always the same)."""
    cases = random.Random(0).sample(cases, len(cases))
    shown = {case: together(*case, at_once) for case in cases}
    left = set().union(*shown.values())
    sample = set()
    while left:
        best = max(cases, key=lambda case: len(left & shown[case]))
        sample.add(best)
        left -= shown[best]
    return sample


# By default every pair of choices, in the slow tests every three; MOEPP_PARITY=all takes the whole cross product.
SAMPLE = covering_sample(all_cases(), 2)
IN_THREES = covering_sample(all_cases(), 3)
TAKES_ALL = os.environ.get("MOEPP_PARITY") == "all"
CASES = [case for case in all_cases() if TAKES_ALL or case in SAMPLE | IN_THREES]


@pytest.mark.parametrize(
    ("setting", "layout"),
    [pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow) for case in CASES],
    ids=name_of,
)
def test_layout_measures_what_one_process_does(pools, reference, setting, layout):
    check(pools, reference(setting), setting, layout)


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_reference_learns_clips_every_step_and_decides_clearly(reference, setting):
    history = reference(setting)
    assert len(history.loss) == len(history.grad_norm) == STEPS and len(history.eval_loss) == 1
    assert history.loss[-1] < history.loss[0] - 0.3
    assert setting.grad_clip is not None and min(history.grad_norm) > 1.2 * setting.grad_clip
    assert history.margin > LEAST_MARGIN, "a choice of experts hangs on rounding: take another run.seed"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_sided_routing_leaves_ranks_without_rows(pools, reference, optimizer):
    setting = Setting(optimizer, one_sided=True)
    for layout, idle in ((Layout(2, 2), {1}), (Layout(4, 4), {2, 3}), (Layout(4, 2), {1, 3})):
        histories = check(pools, reference(setting), setting, layout)
        assert {rank for rank, history in enumerate(histories) if history.rows == 0} == idle, layout


@pytest.mark.slow
@pytest.mark.parametrize("engine", [("native", 0), ("deepspeed", 1), ("deepspeed", 2)], ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_two_expert_parallel_groups_of_four_ranks(pools, reference, setting, engine):
    check(pools, reference(setting), setting, Layout(8, 4, *engine))


# Parameters and router variants that the settings above do not have.
VARIANTS = {
    "tied embeddings": {"model": (("tie_embeddings", True),)},
    "dense layers between": {
        "model": (("moe_layer_interval", 2), ("dense_ffn_hidden_size", 20), ("num_layers", 4)),
    },
    "mlp router": {"moe": (("router", "mlp"), ("scale_input_by_top_k", True))},
    "normalised logits": {"moe": (("logits_norm_std", 1.0), ("gate_normalization", "topk_softmax"))},
    "vanilla MoE": {
        "moe": (
            ("num_constant_experts", 0),
            ("num_copy_experts", 0),
            ("num_zero_experts", 0),
            ("gating_residual", False),
        ),
    },
    "paper's gates, Switch scale": {"moe": (("gate_normalization", "none"), ("balance_loss_switch_scale", True))},
    "no clipping": {"grad_clip": None},
    "clipping now and then": {"grad_clip": 0.9},
}


# Each variant on one of the two layouts, in turn; on the other it is slow.
VARIANT_LAYOUTS = (Layout(2, 2, "deepspeed", 2, micro_batch=2), Layout(4, 2, "deepspeed", 1))
VARIANT_CASES = [
    pytest.param(name, layout, marks=() if (number + place) % 2 == 0 else pytest.mark.slow)
    for number, name in enumerate(VARIANTS)
    for place, layout in enumerate(VARIANT_LAYOUTS)
]


@pytest.mark.parametrize(("name", "layout"), VARIANT_CASES, ids=str)
def test_variant_of_the_model_measures_the_same(pools, reference, name, layout):
    setting = Setting("sgd", **VARIANTS[name])
    wanted = reference(setting)
    assert wanted.margin > LEAST_MARGIN, "a choice of experts hangs on rounding: change the variant"
    check(pools, wanted, setting, layout)


@pytest.mark.parametrize("scope", ["micro_batch", "data_parallel"])
def test_capacity_drops_the_same_where_forwards_hold_the_same_tokens(pools, reference, scope):
    # Capacities are per forward of a rank: 2 sequences each, whether one process runs them in turn or four at once.
    setting = Setting("sgd", moe=(("capacity_factor", 0.8), ("balance_loss_scope", scope)))
    layouts = [Layout(4, 1), Layout(4, 2, "deepspeed", 1), Layout(4, 4)]
    if scope == "micro_batch":  # otherwise f counts what runs at the same time
        layouts += [Layout(1, micro_batch=2), Layout(2, 2, "deepspeed", 2, micro_batch=2)]
    wanted = reference(setting, layouts.pop())
    dropless = reference(Setting("sgd"))
    assert deviation(dropless, wanted).loss > 100 * TOLERANCE, "nothing is dropped"
    for layout in layouts:
        check(pools, wanted, setting, layout)


def test_recompute_leaves_the_numbers_bitwise_alone(pools, reference):
    for setting in SETTINGS[1:3]:
        [observed] = pools(1).run(train, setting, dataclasses.replace(REFERENCE, recompute=True))
        assert deviation(reference(setting), observed).worst == 0


def test_same_layout_measures_the_same_bits_again(pools):
    layout = Layout(4, 2, "deepspeed", 1, micro_batch=1)
    first, second = (pools(4).run(train, SETTINGS[3], layout)[0] for _ in range(2))
    assert deviation(first, second).worst == 0


def _sequences(layout: Layout, step: int, evaluation: bool) -> list[list[int]]:
    """The sequences that all ranks of ``layout`` get in one step, sorted."""
    cfg, rows = make_config(SETTINGS[0], layout), []
    for rank in range(layout.ranks):
        data = make_data(cfg, make_plan(cfg, layout.ranks), rank)
        for micro_step in range(data.plan.accumulation_steps):
            inputs, labels = (data.eval_batch if evaluation else data.train_batch)(step, micro_step)
            rows += torch.cat((inputs, labels), dim=1).tolist()
    return sorted(rows)


def test_every_layout_trains_and_evaluates_on_the_same_sequences():
    places = [Layout(1), Layout(1, micro_batch=1), Layout(2, micro_batch=2), Layout(4), Layout(8)]
    for evaluation, steps in ((False, STEPS), (True, EVAL_BATCHES)):
        for step in range(steps):
            wanted = _sequences(REFERENCE, step, evaluation)
            assert len({tuple(row) for row in wanted}) == len(wanted) == 8
            for layout in places:
                assert _sequences(layout, step, evaluation) == wanted, (layout, step)
    assert len({str(_sequences(REFERENCE, step, False)) for step in range(STEPS)}) == STEPS


@pytest.mark.parametrize("layout", [Layout(2, 2), Layout(4, 2, "deepspeed", 2, recompute=True)], ids=name_of)
@pytest.mark.parametrize("parts", [2, 4])
def test_exchanging_in_parts_leaves_the_numbers_bitwise_alone(pools, layout, parts):
    setting = SETTINGS[-1]  # one rank's experts receive no rows
    wanted = pools(layout.ranks).run(train, setting, layout)
    observed = pools(layout.ranks).run(train, setting, dataclasses.replace(layout, exchange_chunks=parts))
    for one, other in zip(wanted, observed, strict=True):
        assert deviation(one, other).worst == 0 and one.rows == other.rows

"""What `moepp plan` says of a pipeline is what a run does: parameters, bytes sent, micro-batches in flight."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from moepp.cli.main import main
from moepp.config import make_plan
from moepp.distributed.layout import Layout as RankLayout
from moepp.model import stage as stages
from moepp.model.accounting import count_parameters
from moepp.training.estimate import idle_share, in_flight, stage_costs, traffic
from moepp.training.trainer import Trainer
from tests.parity import EVAL_BATCHES, Layout, Setting, make_config, train

SETTING = Setting(
    "sgd",
    model=(("num_layers", 4), ("num_heads", 2), ("num_kv_heads", 2)),
    moe=(("balance_loss_scope", "data_parallel"),),
    steps=2,
)
LAYOUTS = [
    Layout(2, micro_batch=1, pipeline=2),
    Layout(2, micro_batch=1, pipeline=2, chunks=2),
    Layout(4, micro_batch=1, pipeline=4),
    Layout(4, 2, micro_batch=1, pipeline=2, tensor=2),
]


def _observe(rank: int, setting: Setting, layout: Layout) -> dict[str, Any]:
    kept: list[Trainer] = []
    alive: Counter[int] = Counter()
    most: Counter[int] = Counter()

    @contextlib.contextmanager
    def count(model: Any, groups: Any) -> Iterator[None]:
        whole = stages.Stage.forward

        def forward(self: Any, *args: Any, **keywords: Any) -> Any:
            outputs, first = whole(self, *args, **keywords), self.layers.start
            if outputs[0].requires_grad:
                alive[first] += 1
                most[first] = max(most[first], alive[first])
                outputs[0].register_hook(lambda grad: alive.subtract([first]))
            return outputs

        stages.Stage.forward = forward
        yield
        stages.Stage.forward = whole

    train(rank, setting, layout, count, kept.append)
    trainer = kept[0]
    return {
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "sequence_bytes": trainer.parts.comm_stats.sequence_bytes.total(),
        "pipeline_bytes": trainer.parts.comm_stats.pipeline_bytes,
        "in_flight": [most[first] for first in sorted(most)],
    }


COUNTED = dataclasses.replace(SETTING, moe=(("balance_loss_scope", "global_batch"),))  # in a forward of its own


@pytest.mark.parametrize(
    ("setting", "layout"),
    [*((SETTING, layout) for layout in LAYOUTS), (COUNTED, LAYOUTS[0])],
    ids=lambda value: str(value) if isinstance(value, Layout) else "",
)
def test_formulas_say_what_a_run_does(pools, setting, layout):
    cfg = make_config(setting, layout)
    plan = make_plan(cfg, layout.ranks)
    ranks = RankLayout.of(cfg.parallel, layout.ranks)
    costs = stage_costs(cfg, plan, ranks)
    for rank, observed in enumerate(pools(layout.ranks).run(_observe, setting, layout)):
        place = ranks.coordinates(rank).pipeline
        assert observed["parameters"] == costs[place].parameters
        own = range(place, len(plan.stage_layers), layout.pipeline)
        alive = list(in_flight(plan, ranks, place))
        most = [max(chunk) for chunk in zip(*alive, strict=True)]
        assert observed["in_flight"] == most and not any(alive[-1])
        # Evaluation goes forward alone: half the bytes; to the next stage, if there is one.
        sent = traffic(cfg, plan, ranks, place)
        assert observed["sequence_bytes"] == (SETTING.steps + EVAL_BATCHES / 2) * sent.sequence
        per_step = sent.pipeline
        tokens = cfg.data.seq_len * plan.micro_batch_size // ranks.replica_size * plan.accumulation_steps
        crossing = tokens * 4 * (cfg.model.hidden_size + cfg.model.moe.num_experts)
        borders = sum(stage < len(plan.stage_layers) - 1 for stage in own)
        assert observed["pipeline_bytes"] == SETTING.steps * per_step + EVAL_BATCHES * borders * crossing


def test_stages_hold_the_whole_model_once_and_memory_adds_up():
    cfg = make_config(SETTING, Layout(8, 2, pipeline=2, tensor=2))
    layout = RankLayout.of(cfg.parallel, 8)
    costs = stage_costs(cfg, make_plan(cfg, 8), layout)
    assert [cost.layers for cost in costs] == [(0, 1), (2, 3)]
    parameters, model = count_parameters(cfg.model), cfg.model
    split = parameters.ffn_experts + parameters.attention  # both over 2 ranks
    assert sum(cost.parameters for cost in costs) == parameters.total - split // 2
    assert costs[1].parameters - costs[0].parameters == model.hidden_size  # the final norm
    for cost in costs:  # fp32, SGD: weights and gradients
        assert (cost.weights, cost.gradients, cost.optimizer) == (4 * cost.parameters, 4 * cost.parameters, 0)


@pytest.mark.parametrize(("pipeline", "micro_batches"), [(2, 2), (2, 8), (4, 4), (4, 16), (8, 9)])
def test_idle_share_is_that_of_a_simulated_schedule(pipeline, micro_batches):
    """Forwards and backwards of one unit each, 1F1B order; a stage starts when its input is there."""
    done: dict[tuple[str, int, int], int] = {}
    orders = []
    for stage in range(pipeline):
        warm = min(micro_batches, pipeline - stage)
        order = [("F", i) for i in range(warm)]
        for i in range(micro_batches):
            order.append(("B", i))
            if warm + i < micro_batches:
                order.append(("F", warm + i))
        orders.append(order)
    clock, left = [0] * pipeline, sum(map(len, orders))
    while left:
        for stage, order in enumerate(orders):
            while order:
                kind, i = order[0]
                needs = ("F", i, stage - 1) if kind == "F" else ("B", i, stage + 1)
                if kind == "B" and stage == pipeline - 1:
                    needs = ("F", i, stage)
                if not (kind == "F" and stage == 0) and needs not in done:
                    break
                clock[stage] = done[kind, i, stage] = max(clock[stage], done.get(needs, 0)) + 1
                order.pop(0)
                left -= 1
    layout = Layout(pipeline, micro_batch=1, pipeline=pipeline)
    cfg = make_config(Setting(model=(("num_layers", pipeline),)), layout)
    plan = make_plan(cfg, pipeline)
    object.__setattr__(plan, "accumulation_steps", micro_batches)
    idle = 1 - 2 * micro_batches / max(clock)
    assert idle_share(plan, RankLayout.of(cfg.parallel, pipeline), 1) == pytest.approx(idle)


def test_command_prints_a_row_per_stage_and_refuses_what_a_run_would(capsys):
    options = ["model=moepp_0.6b", "engine=native", "data.tokenizer=null", "train.samples=0", "data.seq_len=2048"]
    options += ["train.global_batch_size=64", "parallel.pipeline=2"]
    assert main(["plan", "--ranks", "8", *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("8 ranks = pipeline 2 x data 4 x context 1 x tensor 1; expert 1; 16 micro-batches of 1")
    assert "idle share of the pipeline, with stages that take equally long: 5.9%" in out  # 1 / 17
    assert main(["plan", "--ranks", "3", *options]) == 2
    assert "parallel.pipeline=2 does not divide the 3 processes" in capsys.readouterr().err
    assert main(["plan", "--ranks", "0", *options]) == 2
    assert "--ranks=0 is below its minimum 1" in capsys.readouterr().err
    assert main(["plan", "--ranks", "8", *options, "parallel.pipelines=2"]) == 2
    assert "did you mean parallel.pipeline" in capsys.readouterr().err

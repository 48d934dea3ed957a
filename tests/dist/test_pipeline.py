"""A pipeline computes what one process does: bitwise where it is alone, in losses, gradients and optimizer steps.

The reference runs the same micro-batches on one process. A gradient is what AdamW's first moment holds with beta1 = 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from moepp.config import make_plan
from moepp.distributed import comm
from moepp.distributed.parameters import tensor_dim
from moepp.errors import TrainingError
from moepp.metrics.step_stats import StepStats
from moepp.model import stage as stages
from moepp.training.build import build_engine, build_model
from moepp.training.pipeline import PipelineRunner
from moepp.training.trainer import Trainer
from tests.dist import WorkerPool
from tests.parity import (
    REFERENCE,
    TOLERANCE,
    History,
    Layout,
    Setting,
    deviation,
    group_of,
    make_config,
    make_data,
    train,
)

Pools = Callable[[int], WorkerPool]
Tensors = dict[str, torch.Tensor]
FOUR_LAYERS = (("num_layers", 4), ("num_heads", 4), ("num_kv_heads", 4))
LAST_GRADIENT = (("betas", (0.0, 0.95)),)
GRADIENT_TOLERANCE = 5e-6  # of each parameter's gradient, as a share of its norm
PP2, PP4 = Layout(2, micro_batch=1, pipeline=2), Layout(4, micro_batch=1, pipeline=4)


def setting(steps: int, precision: str = "fp32", **changes: Any) -> Setting:
    changes = {"model": FOUR_LAYERS, "optim": LAST_GRADIENT, "precision": precision, "steps": steps} | changes
    return Setting("adamw", **changes)


def run(rank: int, setting: Setting, layout: Layout, sabotage: Any = None) -> tuple[History, Tensors]:
    """Train, and return what this rank's engine holds at the end.

    FFN experts stand one by one under their global number, parts of attention weights under "/<dimension>/<part>".
    """
    kept: list[Trainer] = []
    history = train(rank, setting, layout, sabotage, kept.append)
    state: Tensors = {}
    groups = kept[0].groups
    for name, tensors in kept[0].engine.read_state():
        for key in ("fp32", "exp_avg"):
            parts = {name: tensors[key]}
            if ".experts." in name:
                first = groups.ep_rank * len(tensors[key])
                parts = {f"{name}.{first + local}": expert for local, expert in enumerate(tensors[key])}
            dim = tensor_dim(name) if groups.tp_size > 1 else None
            suffix = "" if dim is None else f"/{dim}/{groups.tp_rank}"
            state |= {f"{part}/{key}{suffix}": tensor.clone() for part, tensor in parts.items()}
    return history, state


def joined(results: list[tuple[History, Tensors]]) -> tuple[History, Tensors]:
    """One history and the state of the whole model; whatever several ranks hold must be the same on all."""
    whole: Tensors = {}
    for history, state in results:
        assert deviation(results[0][0], history).worst == 0, "ranks disagree about what they measured"
        for key, tensor in state.items():
            assert torch.equal(whole.setdefault(key, tensor), tensor), f"ranks disagree about {key}"
    for key in sorted(key for key in whole if key.count("/") > 1 and key.endswith("/0")):
        name, state, dim, _ = key.split("/")
        parts = [whole.pop(part) for part in sorted(part for part in whole if part.startswith(f"{name}/{state}/"))]
        whole[f"{name}/{state}"] = torch.cat(parts, dim=int(dim))
    return results[0][0], whole


def compare(wanted: tuple[History, Tensors], observed: tuple[History, Tensors]) -> float:
    """Return the largest relative difference of a gradient; every parameter must be there."""
    assert wanted[1].keys() == observed[1].keys()
    worst = 0.0
    for key, tensor in wanted[1].items():
        if key.endswith("/exp_avg"):
            norm = float(tensor.norm())
            worst = max(worst, float((observed[1][key] - tensor).norm()) / (norm if norm > 1e-9 else 1.0))
    return worst


@pytest.fixture(scope="module")
def one_process(pools: Pools) -> Callable[..., tuple[History, Tensors]]:
    """``one_process(setting, micro_batch)``, run once."""
    found: dict[Any, tuple[History, Tensors]] = {}

    def get(setting: Setting, micro_batch: int | None) -> tuple[History, Tensors]:
        if (setting, micro_batch) not in found:
            layout = dataclasses.replace(REFERENCE, micro_batch=micro_batch)
            found[setting, micro_batch] = joined(pools(1).run(run, setting, layout))
        return found[setting, micro_batch]

    return get


ALONE = [
    PP2,
    dataclasses.replace(PP2, micro_batch=2, chunks=2),
    dataclasses.replace(PP2, layers=(1, 3), recompute=True),
    PP4,
    pytest.param(dataclasses.replace(PP2, chunks=2, recompute=True), marks=pytest.mark.slow),
    pytest.param(dataclasses.replace(PP2, micro_batch=4), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout", ALONE, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pipeline_alone_gives_the_same_bits(pools, one_process, layout, precision):
    case = setting(5, precision)
    wanted = one_process(case, layout.micro_batch)
    history, state = joined(pools(layout.ranks).run(run, case, layout))
    for name in ("loss", "balance_loss", "eval_loss"):
        assert getattr(history, name) == getattr(wanted[0], name), name
    # The norm is summed over stages in fp64.
    assert history.grad_norm == pytest.approx(wanted[0].grad_norm, rel=1e-14)
    assert state.keys() == wanted[1].keys()
    assert [key for key in state if not torch.equal(state[key], wanted[1][key])] == []


SPREAD = [
    Layout(4, 2, micro_batch=1, pipeline=2),
    Layout(4, 1, zero=1, micro_batch=1, pipeline=2, chunks=2),
    Layout(4, 2, micro_batch=1, pipeline=2, tensor=2),
    Layout(4, 2, zero=1, micro_batch=1, pipeline=2, context=2, context_method="gather"),
]
EIGHT = [
    Layout(8, 4, micro_batch=1, pipeline=2, tensor=2, context=2),
    Layout(8, 4, zero=1, micro_batch=1, pipeline=2, chunks=2, tensor=2),
    Layout(8, 2, micro_batch=1, pipeline=2, context=2),
    Layout(8, 2, micro_batch=1, pipeline=2),
    Layout(8, 4, micro_batch=1, pipeline=2, chunks=2, recompute=True),
    Layout(8, 2, micro_batch=1, pipeline=4),
]


def mark_slow(layouts: list[Layout]) -> list[Any]:
    return [pytest.param(layout, marks=pytest.mark.slow) for layout in layouts]


@pytest.mark.parametrize("layout", [*SPREAD, *mark_slow(EIGHT)], ids=str)
def test_gradients_of_pipeline_expert_and_data_ranks_agree_with_one_process(pools, one_process, layout):
    case = setting(1, grad_clip=None)
    observed = joined(pools(layout.ranks).run(run, case, layout))
    assert compare(one_process(case, None), observed) < GRADIENT_TOLERANCE


@pytest.mark.parametrize("layout", [SPREAD[1], *mark_slow([SPREAD[0], *SPREAD[2:], *EIGHT])], ids=str)
def test_twenty_clipped_steps_agree_with_one_process(pools, one_process, layout):
    case = setting(20, optim=())
    wanted = one_process(case, None)[0]
    assert wanted.margin > 5e-6, "a choice of experts hangs on rounding: take another setting"
    history, _ = joined(pools(layout.ranks).run(run, case, layout))
    assert deviation(wanted, history).worst < TOLERANCE, deviation(wanted, history)


# Models whose stages exchange something else than hidden states and router logits at every border, and models whose
# router keeps state.
VARIANTS = {
    "dense layers, none before the second border": {
        "model": (*FOUR_LAYERS, ("moe_layer_interval", 4), ("dense_ffn_hidden_size", 20)),
    },
    "a stage of dense layers between MoE layers": {
        "model": (*FOUR_LAYERS, ("num_layers", 6), ("moe_layer_interval", 3), ("dense_ffn_hidden_size", 20)),
    },
    "no gating residuals": {"moe": (("gating_residual", False),)},
    "choices counted by micro-batch, with capacity": {
        "moe": (("balance_loss_scope", "micro_batch"), ("capacity_factor", 0.8)),
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_of_the_model_gives_the_same_bits(pools, one_process, name):
    case = setting(2, **VARIANTS[name])
    layout = dataclasses.replace(PP4, layers=(1, 2, 2, 1)) if dict(case.model)["num_layers"] == 6 else PP4
    wanted, (history, state) = one_process(case, 1), joined(pools(4).run(run, case, layout))
    assert (history.loss, history.balance_loss) == (wanted[0].loss, wanted[0].balance_loss)
    assert [key for key in wanted[1] if not torch.equal(state[key], wanted[1][key])] == []


# What can go wrong between stages and shows in no loss.


@contextlib.contextmanager
def cut_logits(model: Any, groups: Any) -> Iterator[None]:
    """Router logits cross borders without a gradient."""
    whole = stages.Stage.forward

    def forward(self: Any, x: Any, logits: Any = None, **keywords: Any) -> Any:
        hidden, *rest = whole(self, x, logits, **keywords)
        return hidden, *(logits.detach() + 0 * logits for logits in rest)

    with _replaced(stages.Stage, "forward", forward):
        yield


@contextlib.contextmanager
def drop_aux_loss(model: Any, groups: Any) -> Iterator[None]:
    """Inner stages have no auxiliary loss."""
    with _replaced(stages.AddAuxLoss, "backward", staticmethod(lambda ctx, grad: (grad, None, None))):
        yield


@contextlib.contextmanager
def double_aux_loss(model: Any, groups: Any) -> Iterator[None]:
    """Inner stages scale their auxiliary loss wrongly."""
    whole = stages.AddAuxLoss.backward

    def backward(ctx: Any, grad: Any) -> Any:
        return grad, 2 * whole(ctx, grad)[1], None

    with _replaced(stages.AddAuxLoss, "backward", staticmethod(backward)):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@pytest.mark.parametrize("sabotage", [cut_logits, drop_aux_loss, double_aux_loss], ids=lambda mutant: mutant.__name__)
def test_gradients_notice_what_the_first_loss_does_not(pools, one_process, sabotage):
    case = setting(1, grad_clip=None)
    wanted, observed = one_process(case, 1), joined(pools(2).run(run, case, PP2, sabotage))
    assert observed[0].loss == wanted[0].loss
    assert compare(wanted, observed) > 1000 * GRADIENT_TOLERANCE


@contextlib.contextmanager
def overflow_on_the_last_rank(model: Any, groups: Any) -> Iterator[None]:
    """One gradient of the second step is infinite, in one stage."""
    calls = []

    def hook(grad: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return grad * torch.inf if len(calls) == 9 else grad  # 8 micro-batches a step

    _, parameter = list(model.named_parameters())[-1]
    handle = parameter.register_hook(hook) if groups.rank == groups.world_size - 1 else None
    yield
    if handle is not None:
        handle.remove()


def _skipped(rank: int, case: Setting, layout: Layout) -> tuple[int, History]:
    kept: list[Trainer] = []
    history = train(rank, case, layout, overflow_on_the_last_rank, kept.append)
    return kept[0].skipped_steps.total, history


def test_step_that_one_stage_cannot_take_is_skipped_by_all(pools):
    found = pools(2).run(_skipped, setting(4), PP2)
    assert [skipped for skipped, _ in found] == [1, 1]
    assert found[0][1].loss == found[1][1].loss and len(found[0][1].loss) == 3
    assert all(loss == loss for loss in found[0][1].loss)


def _fail_inside(rank: int, where: str) -> None:
    layout = Layout(micro_batch=4)
    cfg, groups = make_config(setting(1), layout), group_of(1)
    plan, stats = make_plan(cfg, 1), comm.CommStats()
    model = build_model(cfg, groups, stats)
    runner = PipelineRunner(model, build_engine(cfg, plan, model, groups), groups, cfg, plan, stats)  # of one stage

    def fail(*args: Any) -> None:
        raise TrainingError("said once")

    if where == "forward":
        model.layers[1].register_forward_pre_hook(fail)
    else:
        model.embed_tokens.weight.register_hook(fail)
    data = make_data(cfg, plan, 0)
    runner.train([data.train_batch(0, step) for step in range(2)], None, StepStats(cfg.model.moe_layers, cfg.model.moe))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_error_inside_a_stage_comes_out_as_it_is(pools, where):
    assert pools(1).run(_fail_inside, where, raises=TrainingError) == ["said once"]

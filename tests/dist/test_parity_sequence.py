"""Training over tensor- and context-parallel ranks measures what one process does; mistakes in it show."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.utils import counters

from moepp.config import make_plan
from moepp.distributed.groups import ParallelGroups
from moepp.distributed.layout import Layout as RankLayout
from moepp.distributed.parameters import Placement
from moepp.distributed.sequence import SequenceParallel
from moepp.engine import native, norms
from moepp.model.compiled import compile_dense_parts
from moepp.model.transformer import Transformer
from moepp.training.estimate import traffic
from moepp.training.trainer import Trainer
from tests.dist import WorkerPool
from tests.parity import REFERENCE, TOLERANCE, Deviation, History, Layout, Setting, deviation, make_config, train

HEADS = (("num_heads", 8), ("num_kv_heads", 4))
DROPLESS = Setting("adamw", model=HEADS)
# Capacity and f_i count the micro-batch: the same tokens only where a layout's forward holds the same sequences.
DROPPING = Setting("sgd", model=HEADS, moe=(("capacity_factor", 0.8), ("balance_loss_scope", "micro_batch")))
LEAST_MARGIN = 5e-6


@pytest.fixture(scope="module")
def reference(pools: Callable[[int], WorkerPool]) -> Callable[..., History]:
    """``reference(setting, layout)``: what one process measures, run once."""
    found: dict[tuple[Setting, Layout], History] = {}

    def get(setting: Setting, layout: Layout = REFERENCE) -> History:
        if (setting, layout) not in found:
            found[setting, layout] = pools(1).run(train, setting, layout)[0]
        return found[setting, layout]

    return get


def measure(pools: Callable[[int], WorkerPool], wanted: History, setting: Setting, layout: Layout, *args: Any) -> Any:
    """The largest deviation from ``wanted``; all ranks must measure the same."""
    observed = pools(layout.ranks).run(train, setting, layout, *args)
    for history in observed:
        assert deviation(observed[0], history).worst == 0, f"ranks disagree: {layout}"
    return deviation(wanted, observed[0])


LAYOUTS = [
    Layout(2, 2, tensor=2),
    Layout(2, 1, context=2, micro_batch=4),
    Layout(2, 2, context=2, context_method="gather", recompute=True),
    Layout(4, 4, tensor=2, context=2),
    Layout(4, 2, tensor=2, context=2, context_method="gather", micro_batch=2),
    Layout(4, 4, tensor=2, zero=1, micro_batch=2),
    Layout(4, 2, pipeline=2, tensor=2, micro_batch=2),
]
MANY = [
    Layout(4, 1, pipeline=2, context=2, context_method="gather", zero=1, micro_batch=2),
    Layout(8, 4, pipeline=2, tensor=2, context=2, micro_batch=2),
    Layout(8, 2, pipeline=2, tensor=2, context=2, context_method="gather", zero=1, micro_batch=1),
    Layout(4, 2, context=2, zero=1),
    Layout(8, 4, tensor=2, context=2),
    Layout(8, 8, tensor=2, context=2, context_method="gather", zero=1, micro_batch=2),
    Layout(8, 2, context=4, micro_batch=1),
]


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(x, marks=pytest.mark.slow) for x in MANY)], ids=str)
def test_layout_measures_what_one_process_does(pools, reference, layout):
    wanted = reference(DROPLESS)
    assert wanted.margin > LEAST_MARGIN, "a choice of experts hangs on rounding: take another run.seed"
    assert measure(pools, wanted, DROPLESS, layout).worst < TOLERANCE


@pytest.mark.parametrize(
    ("layout", "alone"),
    [
        (Layout(2, 2, tensor=2), REFERENCE),
        (Layout(4, 4, tensor=2, context=2, context_method="gather", micro_batch=2), Layout(micro_batch=2)),
        pytest.param(Layout(4, 2, context=2), Layout(2), marks=pytest.mark.slow),  # two replicas
    ],
    ids=str,
)
def test_capacity_and_balance_count_the_replicas_micro_batch(pools, reference, layout, alone):
    wanted = pools(alone.ranks).run(train, DROPPING, alone)[0] if alone.ranks > 1 else reference(DROPPING, alone)
    assert deviation(reference(Setting("sgd", model=HEADS)), wanted).loss > 100 * TOLERANCE, "nothing is dropped"
    assert measure(pools, wanted, DROPPING, layout).worst < TOLERANCE


@pytest.mark.parametrize(
    "layout",
    [
        Layout(4, 1, tensor=2, context=2, recompute=True),
        pytest.param(Layout(4, 1, context=4, context_method="gather", micro_batch=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_attention_sends_what_the_plan_says(pools, layout):
    setting = Setting("sgd", model=HEADS, steps=2)
    cfg = make_config(setting, layout)
    history = pools(layout.ranks).run(train, setting, layout)[0]
    of_a_rank = traffic(cfg, make_plan(cfg, layout.ranks), RankLayout.of(cfg.parallel, layout.ranks), 0).sequence
    assert history.records[1]["comm/sequence_bytes"] == pytest.approx(layout.ranks * of_a_rank)


@pytest.mark.slow
def test_bfloat16_stays_near_one_process(pools, reference):
    setting = Setting("sgd", model=HEADS, precision="bf16", steps=5)
    [wanted] = pools(1).run(train, setting, REFERENCE)
    for method in ("ulysses", "gather"):
        layout = Layout(4, 4, tensor=2, context=2, context_method=method)
        assert measure(pools, wanted, setting, layout).worst < 0.05


def test_documents_stay_apart_in_every_stage(pools, reference):
    setting = Setting("sgd", model=HEADS, document_end=7)
    wanted = reference(setting)
    assert deviation(reference(Setting("sgd", model=HEADS)), wanted).loss > 100 * TOLERANCE
    layout = Layout(4, 2, pipeline=2, context=2, context_method="gather", micro_batch=2)
    assert measure(pools, wanted, setting, layout).worst < TOLERANCE


# Names say what goes wrong. Each is entered before the engine is built and left when the run is over.


def _reduced_over(kind: str, group: str) -> Any:
    right = Placement.group

    def wrong(self: Placement, groups: ParallelGroups) -> Any:
        return getattr(groups, group) if self.kind == kind else right(self, groups)

    return patch.object(Placement, "group", wrong)


def gradients_of_norms_and_routers_not_summed_over_tensor_ranks(model: Transformer, groups: ParallelGroups) -> Any:
    return _reduced_over("dense", "dpcp")


def experts_reduced_over_the_wrong_group(model: Transformer, groups: ParallelGroups) -> Any:
    return _reduced_over("expert", "tp")


def heads_summed_over_all_ranks(model: Transformer, groups: ParallelGroups) -> Any:
    return _reduced_over("tensor", "stage")


def copies_forgotten_in_the_norm(model: Transformer, groups: ParallelGroups) -> Any:
    right = norms.global_norm
    return patch.object(
        native, "global_norm", lambda squares, *args: right([(square, 1) for square, _ in squares], *args)
    )


def labels_of_the_first_tokens(model: Transformer, groups: ParallelGroups) -> Any:
    """The split puts every context rank's part where the first one's is."""
    right = SequenceParallel.context_positions
    return patch.object(
        SequenceParallel, "context_positions", lambda self, seq_len, rank=None, device=None: right(self, seq_len, 0)
    )


MISTAKES = [
    (gradients_of_norms_and_routers_not_summed_over_tensor_ranks, Layout(2, 2, tensor=2)),
    (experts_reduced_over_the_wrong_group, Layout(4, 2, tensor=2, context=2)),
    (heads_summed_over_all_ranks, Layout(2, 2, tensor=2)),
    (copies_forgotten_in_the_norm, Layout(2, 2, tensor=2)),
    (labels_of_the_first_tokens, Layout(2, 1, context=2)),
]


@pytest.mark.parametrize(("mistake", "layout"), MISTAKES)
def test_mistake_shows(pools, reference, mistake, layout):
    observed = pools(layout.ranks).run(train, DROPLESS, layout, mistake)
    found: Deviation = deviation(reference(DROPLESS), observed[0])
    assert found.worst > 10 * TOLERANCE


@contextlib.contextmanager
def compiled(model: Transformer, groups: ParallelGroups) -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    compile_dense_parts(model, "aot_eager")
    yield
    torch._dynamo.reset()


def train_for_weights(rank: int, layout: Layout, *how: Any) -> tuple[History, dict[str, torch.Tensor], int]:
    weights: dict[str, torch.Tensor] = {}

    def inspect(trainer: Trainer) -> None:
        weights.update({name: entry["fp32"].clone() for name, entry in trainer.engine.read_state()})
        weights["graphs"] = torch.tensor(counters["stats"]["unique_graphs"])  # before they are forgotten

    setting = Setting("sgd", model=(*HEADS, ("num_layers", 4)), optim=(("warmup_steps", 0),), steps=2)
    history = train(rank, setting, layout, *(how or (None,)), inspect)
    return history, weights, int(weights.pop("graphs"))


COMPILED = [
    (Layout(2, 2, context=2, context_method="gather", recompute=True), 20),
    (Layout(2, micro_batch=2, pipeline=2), 6),
    (Layout(4, 4, tensor=2, context=2), 20),
    (Layout(2, 2, "fsdp", 3, recompute=True), 10),
    pytest.param(Layout(4, 2, "fsdp", 3, pipeline=2, chunks=2, micro_batch=1), 20, marks=pytest.mark.slow),
    pytest.param(Layout(2, 2, tensor=2, zero=1), 10, marks=pytest.mark.slow),
    pytest.param(Layout(4, 2, pipeline=2, tensor=2, micro_batch=2), 20, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("layout", "most_graphs"), COMPILED, ids=str)
def test_compiled_parts_train_as_uncompiled_ones(pools, layout, most_graphs):
    """Losses, and all weights after two steps: every gradient. What is compiled serves all layers."""
    pool = pools(layout.ranks)
    plain, found = (pool.run(train_for_weights, layout, *how) for how in ((), (compiled,)))
    for (wanted, wanted_weights, _), (history, weights, graphs) in zip(plain, found, strict=True):
        assert 0 < graphs <= most_graphs
        assert deviation(wanted, history).worst < TOLERANCE
        torch.testing.assert_close(weights, wanted_weights, rtol=0, atol=TOLERANCE)

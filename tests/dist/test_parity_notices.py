"""The comparisons of tests/dist/test_parity.py notice mistakes: each test here makes one and expects it to show."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch

from moepp.data.loader import Data
from moepp.distributed import comm, parameters
from moepp.distributed.groups import ParallelGroups
from moepp.distributed.parameters import DENSE, Placement, is_expert_parameter
from moepp.engine import native, norms
from moepp.engine.native import NativeEngine
from moepp.model.init import init_parameters
from moepp.model.transformer import LossOutput, Transformer
from moepp.training.evaluation import Evaluator
from moepp.training.trainer import Trainer
from tests.parity import REFERENCE, SEED, TOLERANCE, Deviation, Layout, Setting, deviation, train

Tensor = torch.Tensor
Sabotage = Callable[[Transformer, ParallelGroups], contextlib.AbstractContextManager[Any]]

# Names say what goes wrong. Each is entered before the engine is built and left when the run is over.


@contextlib.contextmanager
def nothing(model: Transformer, groups: ParallelGroups) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _expert_gradients_times(model: Transformer, factor: float) -> Iterator[None]:
    for name, parameter in model.named_parameters():
        if is_expert_parameter(name):
            parameter.register_hook(lambda grad: grad * factor)
    yield


def expert_gradients_divided_by_their_replicas_too(model: Transformer, groups: ParallelGroups) -> Any:
    return _expert_gradients_times(model, 1 / groups.edp_size)


def expert_gradients_not_divided_by_the_group(model: Transformer, groups: ParallelGroups) -> Any:
    return _expert_gradients_times(model, groups.ep_size)


def expert_gradients_one_hundredth_too_large(model: Transformer, groups: ParallelGroups) -> Any:
    return _expert_gradients_times(model, 1.01)


def gradient_that_crosses_ranks_halved(model: Transformer, groups: ParallelGroups) -> Any:
    right = comm._FinishExchange.backward
    return patch.object(comm._FinishExchange, "backward", staticmethod(lambda ctx, grad: right(ctx, grad / 2)))


@contextlib.contextmanager
def _skip_sum(wrong: Callable[[Tensor, Any], bool]) -> Iterator[None]:
    at_once, started = comm.all_reduce_sum, comm.start_all_reduce_sum
    nothing_to_wait_for = comm.Pending(None)
    with (
        patch.object(comm, "all_reduce_sum", lambda x, group: x if wrong(x, group) else at_once(x, group)),
        patch.object(
            comm,
            "start_all_reduce_sum",
            lambda x, group, *counted: nothing_to_wait_for if wrong(x, group) else started(x, group, *counted),
        ),
    ):
        yield


def _is_gradient(tensor: Tensor) -> bool:
    return tensor.dim() == 1 and tensor.numel() > 100


def norm_not_summed_over_the_ranks(model: Transformer, groups: ParallelGroups) -> Any:
    return _skip_sum(lambda tensor, group: tensor.dim() == 0 and tensor.dtype == torch.float64)


def copies_forgotten_in_the_norm(model: Transformer, groups: ParallelGroups) -> Any:
    right = norms.global_norm
    return patch.object(native, "global_norm", lambda squares, *args: right([(one, 1) for one, _ in squares], *args))


def expert_gradients_summed_over_the_wrong_group(model: Transformer, groups: ParallelGroups) -> Any:
    right = Placement.group
    return patch.object(Placement, "group", lambda self, groups: right(DENSE, groups))


def expert_gradients_not_summed_over_replicas(model: Transformer, groups: ParallelGroups) -> Any:
    return _skip_sum(lambda tensor, group: group is groups.edp and _is_gradient(tensor))


def dense_gradients_not_summed(model: Transformer, groups: ParallelGroups) -> Any:
    return _skip_sum(lambda tensor, group: group is groups.stage and _is_gradient(tensor))


def evaluation_of_one_ranks_part(model: Transformer, groups: ParallelGroups) -> Any:
    right = Evaluator.validate

    def validate(evaluator: Evaluator, *args: Any) -> None:
        with _skip_sum(lambda tensor, group: True):
            right(evaluator, *args)

    return patch.object(Evaluator, "validate", validate)


def _auxiliary_loss_times(factor: float) -> Any:
    right = Transformer.loss

    def loss(model: Transformer, *args: Any) -> LossOutput:
        out = right(model, *args)
        return dataclasses.replace(out, aux_loss=out.aux_loss * factor)

    return patch.object(Transformer, "loss", loss)


def auxiliary_loss_missing(model: Transformer, groups: ParallelGroups) -> Any:
    return _auxiliary_loss_times(0.0)


def auxiliary_loss_of_the_first_rank_alone(model: Transformer, groups: ParallelGroups) -> Any:
    return _auxiliary_loss_times(1.0 if groups.rank == 0 else 0.0)


def auxiliary_loss_not_divided_by_accumulation(model: Transformer, groups: ParallelGroups) -> Any:
    return _auxiliary_loss_times(4.0)


@contextlib.contextmanager
def selections_counted_by_each_rank(model: Transformer, groups: ParallelGroups) -> Iterator[None]:
    model.cfg = dataclasses.replace(model.cfg, moe=dataclasses.replace(model.cfg.moe, balance_loss_scope="micro_batch"))
    yield


def selections_counted_by_micro_batch(model: Transformer, groups: ParallelGroups) -> Any:
    return patch.object(Trainer, "_global_selection_share", lambda trainer, batches: None)


@contextlib.contextmanager
def experts_that_start_alike_on_every_rank(model: Transformer, groups: ParallelGroups) -> Iterator[None]:
    init_parameters(model, SEED, ep_rank=0, ep_size=groups.ep_size)
    yield


def every_rank_reads_the_first_ones_batches(model: Transformer, groups: ParallelGroups) -> Any:
    right = Data._batch

    def batch(data: Data, *args: Any) -> Any:
        data._data_rank = 0
        return right(data, *args)

    return patch.object(Data, "_batch", batch)


def experts_that_do_not_decay(model: Transformer, groups: ParallelGroups) -> Any:
    right = parameters.decays
    return patch.object(parameters, "decays", lambda name, p: right(name, p) and not is_expert_parameter(name))


def clipping_left_out(model: Transformer, groups: ParallelGroups) -> Any:
    return patch.object(NativeEngine, "_clip", lambda engine, grad_norm: None)


def loss_divided_by_the_ranks_twice(model: Transformer, groups: ParallelGroups) -> Any:
    right = NativeEngine.backward
    return patch.object(NativeEngine, "backward", lambda engine, loss: right(engine, loss / groups.world_size))


@contextlib.contextmanager
def gradient_of_every_other_micro_batch_lost(model: Transformer, groups: ParallelGroups) -> Iterator[None]:
    right, count = NativeEngine.backward, 0

    def backward(engine: NativeEngine, loss: Tensor) -> None:
        nonlocal count
        count += 1
        right(engine, loss * (count % 2))

    with patch.object(NativeEngine, "backward", backward):
        yield


MISTAKES: list[tuple[Sabotage, Layout]] = [
    (expert_gradients_divided_by_their_replicas_too, Layout(4, 2)),
    (expert_gradients_divided_by_their_replicas_too, Layout(4, 2, "deepspeed", 1)),
    (expert_gradients_not_divided_by_the_group, Layout(2, 2)),
    (expert_gradients_not_divided_by_the_group, Layout(2, 2, "deepspeed", 2)),
    (expert_gradients_one_hundredth_too_large, Layout(2, 2)),
    (gradient_that_crosses_ranks_halved, Layout(2, 2)),
    (norm_not_summed_over_the_ranks, Layout(2, 2)),
    (norm_not_summed_over_the_ranks, Layout(2, 2, "deepspeed", 0)),
    (norm_not_summed_over_the_ranks, Layout(2, 2, zero=1)),
    (copies_forgotten_in_the_norm, Layout(2, 2)),
    (expert_gradients_summed_over_the_wrong_group, Layout(4, 2)),
    (expert_gradients_summed_over_the_wrong_group, Layout(4, 2, zero=1)),
    (expert_gradients_not_summed_over_replicas, Layout(4, 2)),
    (dense_gradients_not_summed, Layout(2, 2)),
    (evaluation_of_one_ranks_part, Layout(2, 2)),
    (auxiliary_loss_missing, Layout(2, 2)),
    (auxiliary_loss_of_the_first_rank_alone, Layout(2, 2)),
    (auxiliary_loss_not_divided_by_accumulation, Layout(1, micro_batch=2)),
    (selections_counted_by_each_rank, Layout(2, 1)),
    (selections_counted_by_micro_batch, Layout(1, micro_batch=2)),
    (experts_that_start_alike_on_every_rank, Layout(2, 2)),
    (every_rank_reads_the_first_ones_batches, Layout(2, 2)),
    (experts_that_do_not_decay, Layout(2, 2)),
    (clipping_left_out, Layout(2, 2)),
    (loss_divided_by_the_ranks_twice, Layout(2, 2)),
    (gradient_of_every_other_micro_batch_lost, Layout(1, micro_batch=2)),
]


@pytest.fixture(scope="module")
def deviation_under(pools) -> Callable[[Setting, Layout, Sabotage], Deviation]:
    """Largest deviation from one process over the ranks of a layout on which something is broken."""
    references: dict[Setting, Any] = {}

    def get(setting: Setting, layout: Layout, sabotage: Sabotage) -> Deviation:
        if setting not in references:
            references[setting] = pools(1).run(train, setting, REFERENCE)[0]
        histories = pools(layout.ranks).run(train, setting, layout, sabotage)
        return max((deviation(references[setting], history) for history in histories), key=lambda d: d.worst)

    return get


# AdamW, which hides errors of scale, beside: exhaustive, as the slow tests of this folder are.
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("sabotage", "layout"), MISTAKES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_comparison_notices(deviation_under, sabotage, layout, optimizer):
    found = deviation_under(Setting(optimizer), layout, sabotage)
    assert found.worst > 10 * TOLERANCE, found


@pytest.mark.parametrize("layout", sorted({layout for _, layout in MISTAKES}, key=str), ids=str)
def test_the_same_layouts_pass_when_nothing_is_broken(deviation_under, layout):
    assert deviation_under(Setting("sgd"), layout, nothing).worst < TOLERANCE


def test_sgd_shows_a_scale_error_in_the_loss_that_adam_nearly_hides(deviation_under):
    # Without clipping Adam's steps do not depend on the gradient's scale: losses of Adam alone would prove little.
    loss = {
        name: deviation_under(
            Setting(name, grad_clip=None), Layout(2, 2), expert_gradients_not_divided_by_the_group
        ).loss
        for name in ("sgd", "adamw")
    }
    assert loss["sgd"] > 10 * loss["adamw"], loss

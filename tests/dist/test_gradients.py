"""Every parameter's gradient, by engines that keep only shares of it, is that of one process without an engine.

Adam's first moment after one step is a tenth of the gradient, element by element: engines need not be looked into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moepp.distributed import comm
from moepp.distributed.parameters import is_expert_parameter, tensor_dim
from moepp.model.transformer import Transformer
from moepp.training.build import build_model
from moepp.training.trainer import Trainer
from tests.parity import GLOBAL_BATCH, REFERENCE, Layout, Setting, group_of, make_config, make_sequences, train

# The balance loss is left to tests of its own: without it the loss is a mean over tokens, which one line computes.
SETTING = Setting(
    model=(("num_layers", 4), ("num_heads", 4), ("num_kv_heads", 2)),
    moe=(("balance_loss_weight", 0.0), ("z_loss_weight", 0.0)),
    grad_clip=None,
    steps=1,
)
TOLERANCE = 1e-5  # of a parameter's gradient, relative to its length
PP = {"pipeline": 2, "micro_batch": 1}
LAYOUTS = [
    Layout(2, 2, zero=1),
    Layout(2, 1, zero=1, **PP),
    Layout(4, 2, zero=1, tensor=2, context=2, context_method="gather"),
    Layout(2, 2, "fsdp", 3),
    Layout(4, 2, "fsdp", 3, micro_batch=1, recompute=True, tensor=2),
    Layout(4, 2, "fsdp", 3, **PP),
    Layout(4, 2, "deepspeed", 2),
]


def _gradients(rank: int) -> dict[str, Tensor]:
    """Those of the mean loss over the first batch, by autograd alone."""
    cfg = make_config(SETTING, REFERENCE)
    model = build_model(cfg, group_of(), comm.CommStats())
    batch = make_sequences(GLOBAL_BATCH, 1, cfg.model.vocab_size, cfg.data.seq_len)
    ids_BS, labels_BS = (torch.stack([sequence[key] for sequence in batch]) for key in ("tokens", "labels"))
    logits_BSV = model.logits(model(ids_BS).hidden)
    torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _deviations(
    rank: int, layout: Layout, wanted: dict[str, Tensor], sabotage: Callable[..., Any] | None = None
) -> dict[str, float]:
    """How far this rank's gradients are from its parts of the wanted ones, by parameter."""
    groups = group_of(layout.ep, "cpu", layout.pipeline, layout.context, layout.tensor)
    found: dict[str, float] = {}

    def compare(trainer: Trainer) -> None:
        for name, entry in trainer.engine.read_state():
            part = wanted[name]
            if is_expert_parameter(name):
                part = part.chunk(groups.ep_size)[groups.ep_rank]
            elif (dim := tensor_dim(name)) is not None:
                part = part.chunk(groups.tp_size, dim)[groups.tp_rank]
            length = part.norm().clamp(min=1e-6)  # a gate that no token uses has none
            found[name] = float((10 * entry["exp_avg"] - part).norm() / length)

    train(rank, SETTING, layout, sabotage, compare)
    return found


@pytest.fixture(scope="module")
def wanted(pools) -> dict[str, Tensor]:
    return pools(1).run(_gradients)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_gradient_is_that_of_one_process(pools, wanted, layout):
    ranks = pools(layout.ranks).run(_deviations, layout, wanted)
    assert set().union(*ranks) == set(wanted)
    assert {name: value for rank in ranks for name, value in rank.items() if not value < TOLERANCE} == {}


def _divided_by_fsdp_too(model: Transformer, groups: Any) -> Any:
    return patch.object(FSDPModule, "set_gradient_divide_factor", lambda *args: None)


def test_comparison_notices_a_gradient_that_is_divided_twice(pools, wanted):
    ranks = pools(2).run(_deviations, Layout(2, 2, "fsdp", 3), wanted, _divided_by_fsdp_too)
    assert max(max(rank.values()) for rank in ranks) > 0.1

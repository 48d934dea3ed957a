"""The counts behind the balance losses of all layers travel together, once per forward, and nothing waits for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moepp.config import ModelConfig, MoEConfig
from moepp.distributed.comm import CommStats, Pending
from moepp.model import transformer
from moepp.model.init import init_parameters
from moepp.model.transformer import Transformer
from moepp.moe import ExpertParallel

LAYERS, VOCABULARY = 3, 32
MOE = MoEConfig(4, 24, 1, 1, 2, tau=0.5, balance_loss_scope="data_parallel", balance_loss_weight=0.3, z_loss_weight=0.1)


def build(comm_stats: CommStats, cfg: MoEConfig = MOE, recompute: bool = False) -> Transformer:
    shapes = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_layers=LAYERS, num_heads=2, num_kv_heads=2, max_seq_len=16, moe=cfg
    )
    model = Transformer(shapes, ExpertParallel(dist.group.WORLD, dist.group.WORLD, comm_stats))
    init_parameters(model, 0, dist.get_rank(), dist.get_world_size())
    model.set_recompute(recompute)
    return model


def tokens(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * seed + dist.get_rank())
    return torch.randint(VOCABULARY, (2, 9), generator=generator)


def auxiliary_gradients(model: Transformer, ids: torch.Tensor, share: torch.Tensor | None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model.loss(ids[:, :-1], ids[:, 1:], share)
    (out.aux_loss + 0 * out.ce_sum).backward()
    return {"loss": out.aux_loss.detach(), "balance": torch.stack([s.balance_loss for s in out.stats])} | {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def _against_counts_from_outside(rank: int, recompute: bool) -> tuple[Any, Any, list[CommStats]]:
    comm_stats = CommStats()
    model = build(comm_stats, recompute=recompute)
    found, wanted, counted = [], [], []
    for micro_batch in range(2):  # the second one has counts of its own
        ids = tokens(micro_batch)
        with torch.no_grad():
            counts_LE = torch.stack([layer.load_E for layer in model(ids[:, :-1]).stats])
        dist.all_reduce(counts_LE)
        share_LE = counts_LE / (dist.get_world_size() * ids[:, :-1].numel())
        before = dataclasses.replace(comm_stats)
        found.append(auxiliary_gradients(model, ids, None))
        counted.append(
            CommStats(
                balance_bytes=comm_stats.balance_bytes - before.balance_bytes,
                balance_reductions=comm_stats.balance_reductions - before.balance_reductions,
            )
        )
        wanted.append(auxiliary_gradients(model, ids, share_LE))
    return found, wanted, counted


@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients_are_those_of_counts_given_from_outside_and_one_reduction_counts_them(pools, recompute):
    ranks = pools(2).run(_against_counts_from_outside, recompute)
    for found, wanted, counted in ranks:
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.keys() == theirs.keys() and any("router.weight" in name for name in ours)
            for name, value in ours.items():
                torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-9, msg=name)
        expected_bytes = LAYERS * (MOE.num_experts + 1) * 8
        assert [(c.balance_reductions, c.balance_bytes) for c in counted] == [(1, expected_bytes)] * 2
    losses = [[micro_batch["loss"].item() for micro_batch in found] for found, _, _ in ranks]
    assert losses[0] != losses[1], "P is of each rank's own tokens"


def _reductions(rank: int, scope: str, training: bool) -> int:
    comm_stats = CommStats()
    model = build(comm_stats, dataclasses.replace(MOE, balance_loss_scope=scope)).train(training)
    ids = tokens(0)
    model.loss(ids[:, :-1], ids[:, 1:])
    return comm_stats.balance_reductions


@pytest.mark.parametrize(
    ("scope", "training", "reductions"),
    [("data_parallel", False, 0), ("micro_batch", True, 0), ("global_batch", True, 1)],
)
def test_nothing_is_reduced_in_evaluation_or_for_counts_of_one_rank(pools, scope, training, reductions):
    assert pools(2).run(_reductions, scope, training) == [reductions] * 2


def _order_of_work(rank: int) -> list[str]:
    model, ids, events = build(CommStats()), tokens(0), []
    all_reduce, wait, cross_entropy = dist.all_reduce, Pending.wait, transformer.chunked_cross_entropy

    def traced(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(f"{name} async" if kwargs.get("async_op") else name)
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", traced("reduce", all_reduce))
        patch.setattr(Pending, "wait", traced("wait", wait))
        patch.setattr(transformer, "chunked_cross_entropy", traced("cross-entropy", cross_entropy))
        model.loss(ids[:, :-1], ids[:, 1:])
    return events


def test_counts_travel_while_the_cross_entropy_is_computed(pools):
    assert pools(2).run(_order_of_work) == [["reduce async", "cross-entropy", "wait"]] * 2

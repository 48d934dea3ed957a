"""Reduction over ranks and over the steps of a log interval, against sums written out by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moepp.config import MoEConfig
from moepp.metrics import StepStats, Value, reduce_values
from tests.host_waits import device_waits


class Ranks:
    """Threads that sum with each other, one per rank; counts the calls."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[tuple[torch.dtype, int]] = []
        self._barrier = threading.Barrier(size, timeout=120)
        self._tensors: list[torch.Tensor] = [torch.empty(0)] * size

    def sum(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            self._tensors[rank] = tensor
            if rank == 0:
                self.calls.append((tensor.dtype, tensor.numel()))
            self._barrier.wait()
            result = torch.stack(self._tensors).sum(0)
            self._barrier.wait()
            return result

        return reduce

    def run(self, function: Callable[[int, Any], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.size) as executor:
            futures = [executor.submit(function, rank, self.sum(rank)) for rank in range(self.size)]
            return [future.result() for future in futures]


def alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def test_each_value_is_reduced_as_it_declares_in_one_collective() -> None:
    def rank_values(rank: int) -> dict[str, Value]:
        values = {
            "loss": Value.mean(torch.tensor([30.0, 8.0, 0.0][rank]), torch.tensor([10.0, 2.0, 0.0][rank])),
            "bytes": Value.sum(torch.tensor([[2**53, 1], [4, 5], [0, 0]][rank], dtype=torch.int64)),
            "peak": Value.max(torch.tensor([-3.0, -7.0, -9.0][rank])),  # of negative numbers alone
            "times": Value.ranks(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]][rank])),
            "grid": Value.sum(torch.full((2, 2), 10.0**rank)),
        }
        return values if rank != 1 else dict(reversed(values.items()))  # insertion order must not matter

    ranks = Ranks(3)
    for result in ranks.run(lambda rank, s: reduce_values(rank_values(rank), s, rank, 3)):
        assert float(result["loss"]) == pytest.approx(38 / 12)  # not the mean of means
        assert result["bytes"].tolist() == [2**53 + 4, 6]
        assert float(result["peak"]) == -3
        assert result["times"].tolist() == [[1, 2], [3, 4], [5, 6]]
        assert result["grid"].tolist() == [[111, 111], [111, 111]]
    assert ranks.calls == [(torch.float64, 2 + 2 + 3 + 3 * 2 + 4)]


def test_mean_without_weight_anywhere_is_left_out() -> None:
    empty = Value.mean(torch.tensor(0.0), torch.tensor(0.0))
    assert reduce_values({"a": empty, "b": Value.sum(torch.tensor(2.0))}, alone).keys() == {"b"}


def test_what_the_host_counts_joins_what_the_device_sums() -> None:
    parts = {"device": Value.sum(torch.ones(2, device="meta")), "host": Value.max(torch.tensor(3.0))}
    sent: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor)
        return torch.arange(3.0, dtype=torch.float64)  # the meta device has no numbers

    with device_waits() as found:
        reduced = reduce_values(parts, keep)
    assert not found
    assert (sent[0].device.type, sent[0].numel()) == ("meta", 3)
    assert (reduced["device"].tolist(), float(reduced["host"])) == ([0, 1], 2)


MOE = MoEConfig(
    num_ffn_experts=2, num_constant_experts=1, num_copy_experts=1, num_zero_experts=1, ffn_hidden_size=4, top_k=2
)
KINDS = MOE.expert_counts


def layer_stats(
    tokens: int,
    ffn_assignments: int,
    remote: int,
    load: list[int],
    shares: tuple[float, ...],
    drop: float,
    balance: float,
) -> Any:
    """Statistics of one layer and pass; ``shares``: ffn, constant, copy, zero."""
    fields = {"drop_fraction": drop, "balance_loss": balance, "z_loss": 0.0, "num_tokens": tokens}
    fields |= {
        "ffn_assignments": ffn_assignments,
        "remote_assignments": remote,
        "ffn_per_token": ffn_assignments / max(tokens, 1),
    }
    tensors = {name: torch.tensor(float(value)) for name, value in fields.items()}
    more = {"share_Z": torch.tensor(shares), "load_E": torch.tensor(load, dtype=torch.float32), "observation": None}
    return SimpleNamespace(**tensors, **more)


# Two ranks, two steps, two micro-batches in the first step; experts: 2 FFN, 1 constant, 1 copy, 1 zero; K = 2.
# [rank][micro-batch] = (loss sum, loss tokens, layers)
PASSES = [
    [
        (30.0, 9, [layer_stats(10, 12, 4, [9, 5, 3, 2, 1], (0.70, 0.15, 0.10, 0.05), 0.10, 1.5),
                   layer_stats(10, 6, 6, [4, 2, 6, 5, 3], (0.30, 0.30, 0.25, 0.15), 0.00, 2.5)]),
        (10.0, 4, [layer_stats(4, 5, 0, [5, 1, 1, 1, 0], (0.75, 0.125, 0.125, 0.0), 0.125, 1.0),
                   layer_stats(4, 2, 1, [1, 1, 2, 2, 2], (0.25, 0.25, 0.25, 0.25), 0.00, 3.0)]),
        (21.0, 7, [layer_stats(6, 7, 3, [3, 4, 2, 2, 1], (7 / 12, 1 / 6, 1 / 6, 1 / 12), 0.00, 2.0),
                   layer_stats(6, 9, 2, [8, 2, 1, 1, 0], (10 / 12, 1 / 12, 1 / 12, 0.0), 1 / 12, 1.25)]),
    ],
    [
        (90.0, 30, [layer_stats(32, 40, 20, [10, 33, 9, 7, 5], (43 / 64, 9 / 64, 7 / 64, 5 / 64), 3 / 64, 0.5),
                    layer_stats(32, 30, 9, [20, 11, 13, 10, 10], (31 / 64, 13 / 64, 10 / 64, 10 / 64), 1 / 64, 0.75)]),
        (0.0, 0, [layer_stats(0, 0, 0, [0, 0, 0, 0, 0], (0, 0, 0, 0), 0, 0.0)] * 2),
        (2.0, 1, [layer_stats(1, 1, 1, [0, 1, 1, 0, 0], (0.5, 0.5, 0.0, 0.0), 0.0, 4.0),
                  layer_stats(1, 2, 0, [1, 1, 0, 0, 0], (1.0, 0.0, 0.0, 0.0), 0.0, 5.0)]),
    ],
]  # fmt: skip
BYTES = [(1000, 300), (5000, 77)]  # [rank][step]
LAYERS = (1, 3)


def fill(stats: StepStats, rank: int) -> None:
    for number, (loss, tokens, layers) in enumerate(PASSES[rank]):
        stats.add_micro_batch(layers, torch.tensor(loss), tokens)
        if number == 1:
            stats.commit(BYTES[rank][0])
        if number == 2:
            stats.commit(BYTES[rank][1])


def metrics_of(stats: StepStats, sum_reduce: Any = alone, rank: int = 0, size: int = 1) -> dict[str, float]:
    reduced = reduce_values(stats.values(), sum_reduce, rank, size)
    table = stats.routing(reduced)
    losses = {name: float(value) for name, value in reduced.items() if "/" in name}
    return losses if table is None else losses | table.summary() | table.keys_per_layer()


def reduced(rank: int, sum_reduce: Any) -> dict[str, float]:
    stats = StepStats(LAYERS, MOE)
    fill(stats, rank)
    return metrics_of(stats, sum_reduce, rank, 2)


def test_metrics_cover_all_tokens_of_all_ranks_and_steps() -> None:
    passes = [entry for rank in PASSES for entry in rank]
    expected = {
        "train/loss": sum(p[0] for p in passes) / sum(p[1] for p in passes),
        "train/balance_loss": sum(float(layer.balance_loss * layer.num_tokens) for p in passes for layer in p[2])
        / sum(float(p[2][0].num_tokens) for p in passes),
        "comm/dispatch_bytes": (1000 + 300 + 5000 + 77) / 2,
    }
    ffn_per_token, dropped, remote_of, vanilla_of = [], [], [], []
    for row, index in enumerate(LAYERS):
        layers = [p[2][row] for p in passes]
        tokens = sum(float(layer.num_tokens) for layer in layers)
        ffn = sum(float(layer.ffn_assignments) for layer in layers)
        remote = sum(float(layer.remote_assignments) for layer in layers)
        ffn_per_token.append(ffn / tokens)
        dropped.append(sum(float(layer.drop_fraction * layer.num_tokens) for layer in layers) / tokens)
        remote_of.append(remote)
        vanilla_of.append(2 * tokens * remote / ffn)
        for name in ("balance_loss", "drop_fraction"):
            total = sum(float(getattr(layer, name) * layer.num_tokens) for layer in layers)
            expected[f"routing/layer_{index}/{name}"] = total / tokens
        for number, kind in enumerate(KINDS):
            total = sum(float(layer.share_Z[number] * layer.num_tokens) for layer in layers)
            expected[f"routing/layer_{index}/share_{kind}"] = total / tokens
        loads = [sum(float(layer.load_E[e]) for layer in layers) for e in range(2)]
        mean = sum(loads) / 2
        expected[f"routing/layer_{index}/max_over_mean"] = max(loads) / mean
        expected[f"routing/layer_{index}/load_cv"] = abs(loads[0] - mean) / mean  # of two, both are as far away
    expected["routing/ffn_per_token"] = sum(ffn_per_token) / 2
    expected["routing/drop_fraction"] = sum(dropped) / 2
    per_row = expected["comm/dispatch_bytes"] / sum(remote_of)
    expected["comm/dispatch_bytes_vanilla"] = per_row * sum(vanilla_of)
    for row, index in enumerate(LAYERS):
        expected[f"comm/layer_{index}/dispatch_bytes"] = per_row * remote_of[row]
        expected[f"comm/layer_{index}/dispatch_bytes_vanilla"] = per_row * vanilla_of[row]
    for name in (*(f"share_{kind}" for kind in KINDS), "max_over_mean", "load_cv"):
        both = [expected[f"routing/layer_{index}/{name}"] for index in LAYERS]
        expected[f"routing/{name}"] = sum(both) / 2
        if not name.startswith("share"):
            expected[f"routing/{name}_worst"] = max(both)

    for metrics in Ranks(2).run(reduced):
        assert metrics == pytest.approx(expected, rel=1e-6)
        assert sum(metrics[f"routing/layer_1/share_{k}"] for k in KINDS) == pytest.approx(1, rel=1e-6)


def test_reduce_starts_a_new_interval_and_discard_forgets_a_step() -> None:
    stats = StepStats(LAYERS, MOE)
    fill(stats, 0)
    metrics_of(stats)
    loss, tokens, layers = PASSES[1][0]
    stats.add_micro_batch(PASSES[0][0][2], torch.tensor(1e6), 1)
    stats.discard()
    stats.add_micro_batch(layers, torch.tensor(loss), tokens)
    stats.commit(8)
    metrics = metrics_of(stats)
    assert metrics["train/loss"] == pytest.approx(3.0)
    assert metrics["routing/ffn_per_token"] == pytest.approx((40 / 32 + 30 / 32) / 2)
    assert metrics["comm/dispatch_bytes"] == 8


def test_uncommitted_micro_batches_are_not_reported() -> None:
    stats = StepStats(LAYERS, MOE)
    stats.add_micro_batch(PASSES[0][0][2], torch.tensor(30.0), 9)
    assert metrics_of(stats) == {}


def test_nothing_remote_gives_zero_vanilla_bytes_and_no_ffn_choice_leaves_max_over_mean_out() -> None:
    stats = StepStats([0], replace(MOE, top_k=1))
    only_copy = layer_stats(4, 0, 0, [0, 0, 0, 4, 0], (0, 0, 1, 0), 0, 0.5)
    stats.add_micro_batch([only_copy], torch.tensor(8.0), torch.tensor(4))
    stats.commit()
    metrics = metrics_of(stats)
    assert metrics["comm/dispatch_bytes"] == metrics["comm/dispatch_bytes_vanilla"] == 0
    assert "routing/layer_0/max_over_mean" not in metrics
    assert metrics["routing/ffn_per_token"] == 0
    assert metrics["routing/layer_0/share_copy"] == 1


def test_model_without_moe_layers_reports_the_loss_alone() -> None:
    stats = StepStats([], MOE)
    stats.add_micro_batch([], torch.tensor(8.0), 4)
    stats.commit()
    metrics = metrics_of(stats)
    assert metrics == {"train/loss": 2.0}


def test_rows_of_a_rank_that_holds_some_layers_are_put_among_those_of_all() -> None:
    layer_of = PASSES[0][0][2][0]
    one, three, four = (SimpleNamespace(**vars(layer_of) | {"num_tokens": torch.tensor(float(n))}) for n in (1, 3, 4))
    stats = StepStats(range(5), MOE, rows=[1, 3, 4])
    stats.add_micro_batch([one, three, four], torch.tensor(1.0), 1)
    stats.commit()
    assert stats.state()["stats.layers"][:, 0].tolist() == [0, 1, 0, 3, 4]
    assert stats.state()["stats.load"].sum(dim=1).bool().tolist() == [False, True, False, True, True]


def test_the_shapes_of_the_state_are_known_before_it_is_read() -> None:
    for layers in (LAYERS, ()):
        stats = StepStats(layers, MOE)
        stats.add_micro_batch(PASSES[0][0][2] if layers else [], torch.tensor(1.0), 1)
        stats.commit()
        assert {name: tuple(tensor.shape) for name, tensor in stats.state().items()} == stats.state_shapes()


def test_statistics_of_the_wrong_number_of_layers_are_refused() -> None:
    stats = StepStats(LAYERS, MOE)
    with pytest.raises(ValueError, match="1 MoE layers, expected 2"):
        stats.add_micro_batch(PASSES[0][0][2][:1], torch.tensor(1.0), 1)

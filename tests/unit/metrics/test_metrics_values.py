"""Reduction over ranks and over the steps of a log interval, against sums written out by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moepp.metrics import StepStats, Value, reduce_values


class Ranks:
    """Threads that all-reduce with each other, one per rank; counts the calls per rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[tuple[str, torch.dtype]] = []
        self._barrier = threading.Barrier(size, timeout=20)
        self._tensors: list[torch.Tensor] = [torch.empty(0)] * size

    def _reduce(self, rank: int, operation: str, combine: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            self._tensors[rank] = tensor
            if rank == 0:
                self.calls.append((operation, tensor.dtype))
            self._barrier.wait()
            result = combine(torch.stack(self._tensors))
            self._barrier.wait()
            return result

        return reduce

    def run(self, function: Callable[[int, Any, Any], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.size) as executor:
            futures = [
                executor.submit(
                    function,
                    rank,
                    self._reduce(rank, "sum", lambda x: x.sum(0)),
                    self._reduce(rank, "max", lambda x: x.amax(0)),
                )
                for rank in range(self.size)
            ]
            return [future.result() for future in futures]


def alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def test_each_value_is_reduced_as_it_declares_in_one_call_per_operation() -> None:
    def rank_values(rank: int) -> dict[str, Value]:
        values = {
            "loss": Value.mean(torch.tensor([30.0, 8.0][rank]), torch.tensor([10.0, 2.0][rank])),
            "bytes": Value.sum(torch.tensor([[2**53, 1], [4, 5]][rank], dtype=torch.int64)),
            "peak": Value.max(torch.tensor([3.0, 7.0][rank])),
            "grid": Value.sum(torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]][rank])),
        }
        return values if rank == 0 else dict(reversed(values.items()))  # insertion order must not matter

    ranks = Ranks(2)
    for result in ranks.run(lambda rank, s, m: reduce_values(rank_values(rank), s, m)):
        assert float(result["loss"]) == pytest.approx(38 / 12)  # not the mean of 3 and 4
        assert result["bytes"].tolist() == [2**53 + 4, 6]
        assert float(result["peak"]) == 7
        assert result["grid"].tolist() == [[11, 22], [33, 44]]
    assert ranks.calls.count(("sum", torch.float64)) == 1
    assert ranks.calls.count(("max", torch.float64)) == 1
    assert len(ranks.calls) == 2


def test_mean_without_weight_anywhere_is_left_out() -> None:
    empty = Value.mean(torch.tensor(0.0), torch.tensor(0.0))
    assert reduce_values({"a": empty, "b": Value.sum(torch.tensor(2.0))}, alone, alone).keys() == {"b"}


KINDS = {"ffn": 2, "constant": 1, "copy": 1, "zero": 1}


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
    return SimpleNamespace(**tensors, share_Z=torch.tensor(shares), load_E=torch.tensor(load, dtype=torch.float32))


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


def reduced(rank: int, sum_reduce: Any, max_reduce: Any) -> dict[str, float]:
    stats = StepStats(LAYERS, KINDS, top_k=2)
    fill(stats, rank)
    return stats.reduce(sum_reduce, max_reduce)


def test_metrics_cover_all_tokens_of_all_ranks_and_steps() -> None:
    passes = [entry for rank in PASSES for entry in rank]
    expected = {
        "train/loss": sum(p[0] for p in passes) / sum(p[1] for p in passes),
        "train/balance_loss": sum(float(layer.balance_loss * layer.num_tokens) for p in passes for layer in p[2])
        / sum(float(p[2][0].num_tokens) for p in passes),
        "comm/dispatch_bytes": (1000 + 300 + 5000 + 77) / 2,
    }
    ffn_per_token, dropped, vanilla_assignments, remote_assignments = [], [], 0.0, 0.0
    for row, index in enumerate(LAYERS):
        layers = [p[2][row] for p in passes]
        tokens = sum(float(layer.num_tokens) for layer in layers)
        ffn = sum(float(layer.ffn_assignments) for layer in layers)
        remote = sum(float(layer.remote_assignments) for layer in layers)
        ffn_per_token.append(ffn / tokens)
        dropped.append(sum(float(layer.drop_fraction * layer.num_tokens) for layer in layers) / tokens)
        vanilla_assignments += 2 * tokens * remote / ffn
        remote_assignments += remote
        for number, kind in enumerate(KINDS):
            total = sum(float(layer.share_Z[number] * layer.num_tokens) for layer in layers)
            expected[f"routing/layer_{index}/share_{kind}"] = total / tokens
        loads = [sum(float(layer.load_E[e]) for layer in layers) for e in range(2)]
        expected[f"routing/layer_{index}/max_over_mean"] = max(loads) / (sum(loads) / 2)
    expected["routing/ffn_per_token"] = sum(ffn_per_token) / 2
    expected["routing/drop_fraction"] = sum(dropped) / 2
    expected["comm/dispatch_bytes_vanilla"] = expected["comm/dispatch_bytes"] * vanilla_assignments / remote_assignments

    for metrics in Ranks(2).run(reduced):
        assert metrics == pytest.approx(expected, rel=1e-6)
        assert sum(metrics[f"routing/layer_1/share_{k}"] for k in KINDS) == pytest.approx(1, rel=1e-6)


def test_reduce_starts_a_new_interval_and_discard_forgets_a_step() -> None:
    stats = StepStats(LAYERS, KINDS, top_k=2)
    fill(stats, 0)
    stats.reduce(alone, alone)
    loss, tokens, layers = PASSES[1][0]
    stats.add_micro_batch(PASSES[0][0][2], torch.tensor(1e6), 1)
    stats.discard()
    stats.add_micro_batch(layers, torch.tensor(loss), tokens)
    stats.commit(8)
    metrics = stats.reduce(alone, alone)
    assert metrics["train/loss"] == pytest.approx(3.0)
    assert metrics["routing/ffn_per_token"] == pytest.approx((40 / 32 + 30 / 32) / 2)
    assert metrics["comm/dispatch_bytes"] == 8


def test_uncommitted_micro_batches_are_not_reported() -> None:
    stats = StepStats(LAYERS, KINDS, top_k=2)
    stats.add_micro_batch(PASSES[0][0][2], torch.tensor(30.0), 9)
    with pytest.raises(ValueError, match="committed step"):
        stats.reduce(alone, alone)


def test_nothing_remote_gives_zero_vanilla_bytes_and_no_ffn_choice_leaves_max_over_mean_out() -> None:
    stats = StepStats([0], KINDS, top_k=1)
    only_copy = layer_stats(4, 0, 0, [0, 0, 0, 4, 0], (0, 0, 1, 0), 0, 0.5)
    stats.add_micro_batch([only_copy], torch.tensor(8.0), torch.tensor(4))
    stats.commit()
    metrics = stats.reduce(alone, alone)
    assert metrics["comm/dispatch_bytes"] == metrics["comm/dispatch_bytes_vanilla"] == 0
    assert "routing/layer_0/max_over_mean" not in metrics
    assert metrics["routing/ffn_per_token"] == 0
    assert metrics["routing/layer_0/share_copy"] == 1


def test_model_without_moe_layers_reports_the_loss_alone() -> None:
    stats = StepStats([], KINDS, top_k=1)
    stats.add_micro_batch([], torch.tensor(8.0), 4)
    stats.commit()
    metrics = stats.reduce(alone, alone)
    assert metrics == {"train/loss": 2.0, "comm/dispatch_bytes": 0.0, "comm/dispatch_bytes_vanilla": 0.0}


def test_the_shapes_of_the_state_are_known_before_it_is_read() -> None:
    for layers in (LAYERS, ()):
        stats = StepStats(layers, KINDS, top_k=2)
        stats.add_micro_batch(PASSES[0][0][2] if layers else [], torch.tensor(1.0), 1)
        stats.commit()
        assert {name: tuple(tensor.shape) for name, tensor in stats.state().items()} == stats.state_shapes()


def test_statistics_of_the_wrong_number_of_layers_are_refused() -> None:
    stats = StepStats(LAYERS, KINDS, top_k=2)
    with pytest.raises(ValueError, match="1 MoE layers, expected 2"):
        stats.add_micro_batch(PASSES[0][0][2][:1], torch.tensor(1.0), 1)

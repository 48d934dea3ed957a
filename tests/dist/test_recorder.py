"""What is measured of a run: the same in every layout and engine, and of all layers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from moepp.analysis.token_view import TokenView
from moepp.metrics.throughput import Throughput
from moepp.training.runner import WholeModelRunner
from moepp.training.token_tables import view_tokens
from moepp.training.trainer import Trainer
from tests import parity
from tests.parity import REFERENCE, History, Layout, Setting, train

# Nothing is dropped here, so that numbers do not depend on the ranks; layers 1 and 3 are MoE layers.
SETTING = Setting(
    "adamw",
    steps=2,
    validation=("wiki", "code"),
    model=(("num_layers", 4), ("num_kv_heads", 2), ("moe_layer_interval", 2), ("dense_ffn_hidden_size", 10)),
)
LAYOUTS = [
    Layout(2, 2, micro_batch=2),
    Layout(2, 1, zero=1),
    Layout(2, 2, "deepspeed", 0),
    Layout(2, 2, "deepspeed", 1, micro_batch=2),
    Layout(2, 1, "deepspeed", 2),
    Layout(2, 2, "fsdp", 3),
    Layout(2, pipeline=2, micro_batch=2, recompute=True),
    Layout(2, 2, tensor=2),
    Layout(2, context=2),
]
OF_TIME_AND_PLACE = ("time/", "throughput/", "comm/", "memory/")


def _train(rank: int, layout: Layout) -> tuple[History, TokenView, TokenView]:
    views: list[TokenView] = []

    def view(trainer: Trainer) -> None:
        views.append(view_tokens(trainer))
        vocabulary = trainer.cfg.model.vocab_size
        source_T = np.random.default_rng(0).integers(0, vocabulary, 20 * trainer.cfg.data.seq_len + 1, np.uint16)
        views.append(view_tokens(trainer, source_T, 2 * trainer.plan.tokens_per_step))

    history = train(rank, SETTING, layout, inspect=view)
    return history, views[0], views[1]


@pytest.fixture(scope="module")
def reference(pool_1) -> tuple[History, TokenView, TokenView]:
    return pool_1.run(_train, REFERENCE)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_metric_is_that_of_one_process(pool_2, reference, layout):
    expected, tokens, of_path = reference
    for history, view, path_view in pool_2.run(_train, layout):
        _check_tokens(view, tokens)
        _check_tokens(path_view, of_path)
        for wanted, found in zip(expected.records, history.records, strict=True):
            kept = {name: value for name, value in found.items() if not name.startswith(OF_TIME_AND_PLACE)}
            wanted = {name: value for name, value in wanted.items() if not name.startswith(OF_TIME_AND_PLACE)}
            assert kept == pytest.approx(wanted, rel=1e-4, abs=1e-9)
            if "train/grad_norm" in found:
                _check_norms(found)
                _check_times(found, layout)


@contextlib.contextmanager
def _second_step_is_broken(*_: Any) -> Iterator[None]:
    """On devices whose peak is known."""
    step, losses_of = iter(range(SETTING.steps)), WholeModelRunner.train

    def broken(self: WholeModelRunner, *args: Any) -> Any:
        return losses_of(self, *args) * (math.nan if next(step) == 1 else 1.0)

    with (
        mock.patch.object(parity, "Throughput", lambda size, _: Throughput(size, 1e12)),
        mock.patch.object(WholeModelRunner, "train", broken),
    ):
        yield


def _train_broken(rank: int, setting: Setting) -> list[dict[str, float]]:
    return train(rank, setting, REFERENCE, _second_step_is_broken).records


def test_of_steps_that_did_not_count_nothing_is_made_up(pool_1):
    [(whole, broken, _)] = pool_1.run(_train_broken, SETTING)
    of_routing = {
        name for name in whole if name.startswith(("routing/", "comm/", "train/balance_loss", "train/z_loss"))
    }
    unknown = {"train/loss", "throughput/mfu", "throughput/ffn_assignments_per_second", *of_routing}
    assert len(of_routing) > 20 and whole.keys() - broken.keys() == unknown and broken["train/skipped_steps"] == 1
    assert broken["throughput/tokens_per_second"] > 0 and broken["time/step"] > 0


def test_a_model_without_moe_layers_has_costs_where_a_step_did_not_count(pool_1):
    dense = replace(SETTING, validation=(), model=(*SETTING.model, ("moe_layer_interval", 9)))
    for record in pool_1.run(_train_broken, dense)[0][:2]:
        assert record["throughput/mfu"] > 0 and record["throughput/ffn_assignments_per_second"] == 0
        assert record["comm/dispatch_bytes"] == record["comm/dispatch_bytes_vanilla"] == 0


def test_each_validation_set_has_its_own_loss(reference):
    [record] = [record for record in reference[0].records if "eval/loss" in record]
    names = ["eval", "eval/wiki", "eval/code"]
    assert record.keys() == {f"{name}/{metric}" for name in names for metric in ("loss", "perplexity")}
    assert len({record[f"{name}/loss"] for name in names}) == 3
    for name in names:
        assert record[f"{name}/perplexity"] == pytest.approx(math.exp(record[f"{name}/loss"]))


def _check_tokens(view: TokenView, wanted: TokenView) -> None:
    """Every rank has every token, in whatever order sequences went to replicas."""
    order, other = (np.lexsort(one.input_ids_NS.T) for one in (view, wanted))
    np.testing.assert_array_equal(view.input_ids_NS[order], wanted.input_ids_NS[other])
    np.testing.assert_allclose(view.losses_NS[order], wanted.losses_NS[other], rtol=1e-4)
    np.testing.assert_allclose(view.ffn_NS[order], wanted.ffn_NS[other])
    assert len(np.unique(wanted.ffn_NS)) > 1 and wanted.losses_NS.min() > 0
    for kind, share_L in wanted.shares.items():
        np.testing.assert_allclose(view.shares[kind], share_L)


def _check_norms(record: dict[str, float]) -> None:
    by_module = [value for name, value in record.items() if name.startswith("norm/gradient/")]
    assert len(by_module) == 8  # none of the kinds of module is missing
    assert math.hypot(*by_module) == pytest.approx(record["train/grad_norm"], rel=1e-5)
    in_layers = [record[f"norm/layer_{layer}/weight"] for layer in range(4)]
    outside = [record[f"norm/weight/{module}"] for module in ("embedding", "lm_head")]
    all_weights = [value for name, value in record.items() if name.startswith("norm/weight/")]
    assert math.hypot(*in_layers, *outside) < math.hypot(*all_weights)  # the last norm's weight, 1 each, is left
    assert math.hypot(*in_layers, *outside, 4.0) == pytest.approx(math.hypot(*all_weights), rel=1e-2)


def _check_times(record: dict[str, float], layout: Layout) -> None:
    stages = {name: value for name, value in record.items() if name.startswith("time/") and "_" not in name}
    assert stages.pop("time/step") == pytest.approx(sum(stages.values()))
    expected = {"data", "forward", "backward", "optimizer", "reduction", "other"}
    expected |= {"exchange"} if layout.ep > 1 else set()
    expected |= {"pipeline"} if layout.pipeline > 1 else set()
    assert stages.keys() == {f"time/{name}" for name in expected}
    assert all(1 <= record[f"{name}_max_over_mean"] <= 2 for name in stages)
    assert record["time/slowest_rank"] in (0, 1)

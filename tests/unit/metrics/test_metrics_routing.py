"""What is said of routers: against loops over tokens, within its bounds, and as it is kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moepp.config import MoEConfig
from moepp.errors import RunError
from moepp.metrics.norms import MODULES, ModuleNorms
from moepp.metrics.routing import COLUMNS, MAX_LAYERS, RoutingTable, spaced
from moepp.metrics.routing_file import FILE, RoutingSink, read_routing
from moepp.moe import MoELayer
from moepp.moe.observation import BINS, num_columns

MOE = MoEConfig(
    num_ffn_experts=3, num_constant_experts=1, num_copy_experts=1, num_zero_experts=1, ffn_hidden_size=4, top_k=2
)


def table_of(observed_LO: np.ndarray, moe: MoEConfig = MOE, load_LE: np.ndarray | None = None) -> RoutingTable:
    num_layers = len(observed_LO)
    rng = np.random.default_rng(0)
    sums_LC = rng.uniform(1, 9, (num_layers, len(COLUMNS) + len(moe.expert_counts)))
    load_LE = rng.integers(1, 99, (num_layers, moe.num_experts)) if load_LE is None else load_LE
    return RoutingTable(tuple(range(num_layers)), moe, sums_LC, load_LE, observed_LO, bytes_sent=100.0)


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(x) for x in logits]
    return [power / sum(powers) for power in powers]


def gate_weights(logits: list[float]) -> list[float]:
    """Of the two best experts, by the released code's rule: the zero expert, the last one, weighs nothing."""
    probs = softmax(logits)
    best = sorted(range(len(logits)), key=lambda e: -probs[e])[:2]
    kept = [0.0 if e == len(logits) - 1 else probs[e] for e in best]
    return [weight / sum(kept) if sum(kept) else 0.0 for weight in kept]


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
def test_observations_are_those_of_a_loop_over_tokens(kernels: str) -> None:
    from moepp.ops import use_kernels

    torch.manual_seed(0)
    layer = MoELayer(MOE, 8, layer_index=1)
    x_TD, prev_TE = torch.randn(37, 8), torch.randn(37, 6)
    with torch.no_grad():
        layer.router.weight.mul_(30)
        layer.router.gate_map.weight.mul_(40)
    assert layer(x_TD, prev_TE).stats.observation is None
    layer.observes = True
    with use_kernels(kernels):
        out = layer(x_TD, prev_TE)
    assert out.stats.observation is not None
    found = table_of(out.stats.observation.numpy()[None])

    weights_TE, residual_TE = x_TD @ layer.router.weight.T, prev_TE @ layer.router.gate_map.weight.T
    logits = (weights_TE + residual_TE).tolist()
    expected = {
        "entropy": [-sum(p * math.log(p) for p in softmax(row)) for row in logits],
        "z_loss": [math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits],
        "logit_norm": [math.sqrt(sum(x * x for x in row)) for row in logits],
    }
    for ending, rows in (("", logits), ("_without_residual", weights_TE.tolist())):
        for choice, name in enumerate(("first", "second")):
            expected[f"gate_{name}{ending}"] = [gate_weights(row)[choice] for row in rows]
    for name, values in expected.items():
        assert found.per_layer[name][0] == pytest.approx(np.mean(values), rel=1e-5), name
        if name.startswith("gate_"):
            assert found.per_layer[f"{name}_std"][0] == pytest.approx(np.std(values), rel=1e-4)
            counts, _ = np.histogram(values, bins=BINS, range=(0, 1))
            assert found.gates[name.removeprefix("gate_")][0].tolist() == pytest.approx((counts / 37).tolist())
    assert found.per_layer["gate_first"][0] != pytest.approx(
        found.per_layer["gate_first_without_residual"][0], rel=0.01
    )


def test_a_router_that_chooses_in_its_own_way_is_asked_what_it_does_without_residuals() -> None:
    import docs.examples.bias_router  # noqa: F401

    torch.manual_seed(0)
    layer = MoELayer(replace(MOE, router="bias", gate_normalization="none"), 8, layer_index=1)
    x_TD, prev_TE = torch.randn(37, 8), torch.randn(37, 6)
    with torch.no_grad():
        layer.router.weight.mul_(30)
        layer.router.gate_map.weight.mul_(40)
        layer.router.bias.copy_(torch.linspace(-0.3, 0.3, 6))
    layer.observes = True
    observation = layer(x_TD, prev_TE).stats.observation
    assert observation is not None
    found = table_of(observation.numpy()[None], layer.cfg).per_layer
    plain_TK = layer.router.choose(x_TD @ layer.router.weight.T).weights_TK.detach()
    for choice, name in enumerate(("first", "second")):
        without = found[f"gate_{name}_without_residual"][0]
        assert without == pytest.approx(float(plain_TK[:, choice].mean()), rel=1e-5)
        assert found[f"gate_{name}"][0] != pytest.approx(without, rel=0.01)


def test_the_first_layer_has_no_residual_and_training_is_the_same_while_observed() -> None:
    torch.manual_seed(0)
    layer = MoELayer(MOE, 8)
    x_TD = torch.randn(20, 8)
    gradients = []
    for layer.observes in (False, True):
        layer.zero_grad()
        out = layer(x_TD)
        (out.hidden.square().sum() + out.aux_loss).backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    found = table_of(out.stats.observation.numpy()[None])
    assert found.per_layer["gate_first"] == found.per_layer["gate_first_without_residual"]


def test_no_token_and_one_choice_and_no_residual_have_their_columns() -> None:
    moe = replace(MOE, top_k=1, gating_residual=False)
    layer = MoELayer(moe, 8)
    layer.observes = True
    observed = layer(torch.zeros(0, 8)).stats.observation
    assert observed.tolist() == [0.0] * num_columns(moe)
    table = table_of(observed.numpy()[None], moe)
    assert not any(name.startswith(("gate_", "entropy")) for name in table.per_layer) and table.gates == {}
    observed = layer(torch.randn(5, 8)).stats.observation
    names = [name for name in table_of(observed.numpy()[None], moe).per_layer if name.startswith("gate_")]
    assert names == ["gate_first", "gate_first_std"]


@pytest.mark.parametrize("num_layers", [1, MAX_LAYERS, MAX_LAYERS + 1, 500])
def test_the_number_of_keys_is_bounded_whatever_the_models_size(num_layers: int) -> None:
    moe = replace(MOE, num_ffn_experts=256)
    table = table_of(np.ones((num_layers, num_columns(moe))), moe)
    norms = ModuleNorms(num_layers, torch.device("cpu"))
    reduced = {"norms": torch.ones(num_layers + 1, len(MODULES), 2)}
    brief = table.summary() | norms.metrics(reduced, by_layer=False)
    detailed = table.summary() | table.keys_per_layer() | norms.metrics(reduced, by_layer=True)
    assert len(brief) == len(table_of(np.ones((1, num_columns(moe))), moe).summary()) + 2 * len(MODULES) <= 60
    assert len(detailed) - len(brief) <= 24 * min(num_layers, MAX_LAYERS)
    kept = {int(name.split("layer_")[1].split("/")[0]) for name in detailed if "layer_" in name}
    assert kept == set(spaced(num_layers)) and {0, num_layers - 1} <= kept


def test_an_unused_layer_counts_in_no_mean() -> None:
    load_LE = np.array([[4, 0, 2, 1, 1, 1], [0, 0, 0, 9, 0, 0]])
    table = table_of(np.zeros((2, num_columns(MOE))), load_LE=load_LE)
    assert table.summary()["routing/max_over_mean"] == table.summary()["routing/max_over_mean_worst"] == 2
    assert "routing/layer_1/max_over_mean" not in table.keys_per_layer()


def test_the_history_keeps_every_layer_and_begins_again_where_a_run_continues(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    load_LE = np.array([[4, 0, 2, 1, 1, 1], [0, 0, 0, 9, 0, 0]])
    snapshots = [
        table_of(rng.uniform(1, 2, (2, num_columns(MOE))), load_LE=load_LE * step).snapshot(step, 10 * step)
        for step in (10, 20, 30)
    ]
    sink = RoutingSink(tmp_path)
    for snapshot in snapshots:
        sink.log({"train/loss": 1.0}, snapshot.step, snapshot.tokens)
        sink.log_routing(snapshot)
    sink.rewind(20)
    sink.close()
    found = read_routing(tmp_path)
    assert [(one.step, one.tokens) for one in found] == [(10, 100), (20, 200)]
    assert found[0].layers == (0, 1) and found[0].kinds == MOE.expert_counts
    np.testing.assert_allclose(found[0].share_LE, load_LE / 9, rtol=1e-5)
    for one, wanted in zip(found, snapshots, strict=False):
        assert one.per_layer.keys() == wanted.per_layer.keys() and one.gates.keys() == wanted.gates.keys()
        for name, values_L in one.per_layer.items():
            np.testing.assert_allclose(values_L, wanted.per_layer[name], rtol=1e-5)
        for name, shares in one.gates.items():
            np.testing.assert_allclose(shares, wanted.gates[name], rtol=1e-5)
    RoutingSink(tmp_path, start_step=10).close()
    assert [one.step for one in read_routing(tmp_path)] == [10]
    assert read_routing(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("change", ["share", "kinds", "per_layer", "gates", "step"])
def test_a_damaged_history_is_refused(tmp_path: Path, change: str) -> None:
    sink = RoutingSink(tmp_path)
    for step in (1, 2):
        sink.log_routing(table_of(np.ones((2, num_columns(MOE)))).snapshot(step, step))
    sink.close()
    path = tmp_path / FILE
    first, second = path.read_text().splitlines()
    line = json.loads(first)
    line[change] = {"share": line["share"][:1], "kinds": {"ffn": 7}, "per_layer": {"entropy": [1.0]}}.get(change, "x")
    path.write_text(f"{json.dumps(line)}\n{second}\n")
    with pytest.raises(RunError, match="line 1"):
        read_routing(tmp_path)

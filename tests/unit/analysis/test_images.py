"""Pictures that W&B gets while a run trains."""

from __future__ import annotations

from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest

from moepp.analysis import images
from moepp.analysis.images import gate_distributions, routing_images
from moepp.metrics.routing import RoutingSnapshot


def snapshot(kinds: dict[str, int], share_LE: np.ndarray) -> RoutingSnapshot:
    return RoutingSnapshot(10, 1000, tuple(range(len(share_LE))), kinds, share_LE, {}, {})


def yellow(image: np.ndarray) -> np.ndarray:
    """Columns and rows of the pixels in the colour of the largest value, left of the colour bar."""
    red, green, blue = (image[:, : int(0.75 * image.shape[1]), c].astype(int) for c in range(3))
    return np.argwhere((red > 240) & (green > 220) & (blue < 60))[:, ::-1]


def test_the_busiest_expert_is_the_brightest_cell_of_its_row_and_column():
    share_LE = np.full((2, 4), 0.1)
    share_LE[0, 3] = 0.7  # first layer, last expert: top right
    share_LE[1] = 0.25
    before = dict(mpl.rcParams)
    found = routing_images(snapshot({"ffn": 3, "zero": 1}, share_LE))
    assert dict(mpl.rcParams) == before
    assert found.keys() == {"routing/experts", "routing/ffn_load"}
    experts = found["routing/experts"]
    assert experts.dtype == np.uint8 and experts.shape[2] == 3
    x, y = yellow(experts).mean(axis=0)
    assert x > 0.55 * 0.75 * experts.shape[1] and y < 0.5 * experts.shape[0]
    share_LE[:] = share_LE[::-1].copy()
    assert yellow(routing_images(snapshot({"ffn": 3, "zero": 1}, share_LE))["routing/experts"]).mean(axis=0)[1] > y


def test_a_model_without_ffn_experts_has_no_map_of_their_load():
    assert routing_images(snapshot({"ffn": 0, "zero": 2}, np.full((1, 2), 0.5))).keys() == {"routing/experts"}
    assert routing_images(snapshot({"ffn": 2}, np.zeros((1, 2)))).keys() == {"routing/experts", "routing/ffn_load"}


def test_gate_weights_are_four_lines_with_and_without_residuals(monkeypatch):
    monkeypatch.setattr(images, "_heat_map", lambda *of: np.zeros((288, 480, 3), np.uint8))
    draw = np.random.default_rng(0)
    names = ("first", "second", "first_without_residual", "second_without_residual")
    gates = {name: draw.dirichlet(np.ones(20), 3) for name in names}
    gates["first"][1] = np.nan  # a layer that was not observed
    one = replace(snapshot({"ffn": 2, "zero": 1}, np.full((3, 3), 1 / 3)), gates=gates)
    found = gate_distributions(one)
    assert list(found) == ["first choice", "second choice", "first, without residuals", "second, without residuals"]
    assert found["first choice"] == pytest.approx((gates["first"][0] + gates["first"][2]) / 2)
    assert found["second, without residuals"] == pytest.approx(gates["second_without_residual"].mean(axis=0))
    image = routing_images(one)["routing/gates"]
    assert image.dtype == np.uint8 and image.shape == routing_images(one)["routing/experts"].shape
    for name in names:
        moved = replace(one, gates=gates | {name: gates[name][:, ::-1]})
        assert (routing_images(moved)["routing/gates"] != image).any(), f"{name} is drawn"
    unknown = replace(one, gates=gates | {"second": np.full((3, 20), np.nan)})
    assert "routing/gates" in routing_images(unknown)
    assert "routing/gates" not in routing_images(replace(one, gates={"first": np.full((3, 20), np.nan)}))

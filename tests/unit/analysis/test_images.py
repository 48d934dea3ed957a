"""Heat maps that W&B gets while a run trains."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np

from moepp.analysis.images import routing_images
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
    images = routing_images(snapshot({"ffn": 3, "zero": 1}, share_LE))
    assert dict(mpl.rcParams) == before
    assert images.keys() == {"routing/experts", "routing/ffn_load"}
    experts = images["routing/experts"]
    assert experts.dtype == np.uint8 and experts.shape[2] == 3
    x, y = yellow(experts).mean(axis=0)
    assert x > 0.55 * 0.75 * experts.shape[1] and y < 0.5 * experts.shape[0]
    share_LE[:] = share_LE[::-1].copy()
    assert yellow(routing_images(snapshot({"ffn": 3, "zero": 1}, share_LE))["routing/experts"]).mean(axis=0)[1] > y


def test_a_model_without_ffn_experts_has_no_map_of_their_load():
    assert routing_images(snapshot({"ffn": 0, "zero": 2}, np.full((1, 2), 0.5))).keys() == {"routing/experts"}
    assert routing_images(snapshot({"ffn": 2}, np.zeros((1, 2)))).keys() == {"routing/experts", "routing/ffn_load"}

"""Launches of the layer on an accelerator do not grow; see tests/launches.py and the table of docs/layer.md."""

from __future__ import annotations

import importlib.util

import pytest

from tests.launches import CONFIGS, count

# Per layer of a model of 12, forward and backward.
LIMITS = {
    "torch": {"capacity": (61, 42), "dropless": (50, 42), "vanilla, dropless": (32, 24)},
    "triton": {"capacity": (39, 31), "dropless": (27, 31), "vanilla, dropless": (21, 14)},
}


def check(name: str, kernels: str) -> None:
    counts = count(CONFIGS[name], kernels)
    for what, launches, limit in zip(("forward", "backward"), counts, LIMITS[kernels][name], strict=True):
        assert limit - 1 < launches <= limit + 0.5, f"{what}: {launches:.1f}; keep the table of docs/layer.md true"


@pytest.mark.parametrize("name", CONFIGS)
def test_launches_by_torch(name):
    check(name, "torch")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="pip install 'moepp[triton]'")
@pytest.mark.parametrize("name", CONFIGS)
def test_launches_with_triton(name):
    check(name, "triton")

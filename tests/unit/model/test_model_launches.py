"""Launches around the MoE layer on an accelerator do not grow; see tests/launches_dense.py and docs/gpu.md."""

from __future__ import annotations

import importlib.util

import pytest

from tests.launches_dense import attention, count, loss, norm

MOST = {
    ("torch", norm): (1, 2, 2.1),
    ("torch", attention): (17, 25, 12.6),
    ("torch", loss): (69, 3, 6.2),
    ("triton", attention): (10, 19, 12.6),
    ("triton", loss): (37, 3, 6.2),
}


@pytest.mark.parametrize(("kernels", "part"), list(MOST), ids=lambda value: getattr(value, "__name__", value))
def test_launches_and_bytes_kept(kernels, part):
    if kernels == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("pip install 'moepp[triton]'")
    found, most = count(part, kernels), MOST[kernels, part]
    assert all(one <= other + 0.05 for one, other in zip(found, most, strict=True)), f"{found}, at most {most}"

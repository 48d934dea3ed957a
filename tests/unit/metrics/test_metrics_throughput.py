"""Tokens per second and MFU."""

from __future__ import annotations

import pytest

from moepp.metrics import Throughput, peak_flops_per_second


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_cover_the_interval_without_paused_time() -> None:
    clock = Clock()
    throughput = Throughput(num_devices=4, peak_flops=1000.0, clock=clock)
    throughput.add(300)
    clock.now += 2
    with throughput.paused():
        clock.now += 50
    throughput.add(500)
    clock.now += 3
    assert throughput.read(flops_per_token=6.0) == pytest.approx(
        {
            "throughput/tokens_per_second": 160.0,
            "throughput/tokens_per_second_per_device": 40.0,
            "throughput/mfu": 0.24,
        }
    )
    throughput.add(10)
    clock.now += 1
    assert throughput.read(flops_per_token=6.0)["throughput/tokens_per_second"] == pytest.approx(10)


def test_unknown_peak_gives_no_mfu() -> None:
    clock = Clock()
    throughput = Throughput(num_devices=1, peak_flops=peak_flops_per_second("cpu", "bf16"), clock=clock)
    throughput.add(10)
    clock.now += 1
    assert "throughput/mfu" not in throughput.read(flops_per_token=6.0)


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("Tesla V100-SXM2-32GB", None),  # no bf16 units
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),  # a slice
        ("NVIDIA A10G", None),  # not an A10
        ("NVIDIA GeForce GTX 1080", None),
        ("Intel(R) Xeon(R) Platinum", None),
    ],
)
def test_peak_is_known_for_listed_devices_only(name: str, bf16: float | None) -> None:
    assert peak_flops_per_second(name, "bf16") == bf16


def test_peak_depends_on_precision() -> None:
    assert peak_flops_per_second("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12

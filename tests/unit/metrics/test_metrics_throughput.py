"""Tokens per second and MFU."""

from __future__ import annotations

import pytest

from moepp.metrics import Throughput, peak_flops_per_second, throughput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_cover_the_interval_without_paused_time() -> None:
    clock = Clock()
    meter = Throughput(num_devices=4, peak_flops=1000.0, clock=clock)
    clock.now += 1000  # a checkpoint is read
    meter.begin()
    meter.add(300)
    clock.now += 2
    with meter.paused():
        clock.now += 50
    meter.add(500)
    clock.now += 3
    assert meter.read(flops_per_token=6.0) == pytest.approx(
        {
            "throughput/tokens_per_second": 160.0,
            "throughput/tokens_per_second_per_device": 40.0,
            "throughput/mfu": 0.24,
        }
    )
    meter.add(10)
    clock.now += 1
    assert meter.read(flops_per_token=6.0)["throughput/tokens_per_second"] == pytest.approx(10)


def test_unknown_peak_gives_no_mfu() -> None:
    clock = Clock()
    meter = Throughput(num_devices=1, peak_flops=peak_flops_per_second("cpu", "bf16"), clock=clock)
    meter.add(10)
    clock.now += 1
    assert "throughput/mfu" not in meter.read(flops_per_token=6.0)


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H100 80GB HBM2e", 756e12),
        ("NVIDIA H800", 989.4e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA H800 NVL", None),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 3080", None),  # of 10 and of 12 GB
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B300 SXM6 AC", 2250e12),
        ("NVIDIA GB10", None),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("AMD Instinct MI250X", 191.5e12),
        ("AMD Instinct MI250X/MI250", None),  # either of two
        ("AMD Instinct MI325X", 1307.4e12),
        ("AMD Instinct MI355X", 2516.6e12),
        ("Tesla T4", None),
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


def test_every_listed_peak_is_that_of_one_pattern_and_bf16_is_no_slower_than_fp32() -> None:
    patterns = [pattern for pattern, _, _ in throughput._PEAK_FLOPS]
    assert len(set(patterns)) == len(patterns)
    for pattern, bf16, fp32 in throughput._PEAK_FLOPS:
        assert fp32 is not None and 5e12 < fp32 < 200e12, pattern
        assert bf16 is None or 1.9 * fp32 < bf16 < 40 * fp32, pattern


def test_peak_depends_on_precision() -> None:
    assert peak_flops_per_second("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12

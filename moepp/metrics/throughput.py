"""Tokens per second and model FLOPs utilisation (MFU)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Dense peak FLOP/s by device: (pattern of the device's name, bf16, fp32). From the vendors' data sheets, without
# sparsity; fp32 is the plain (not TF32) rate, which is what torch uses by default. None: no bf16 units.
_PEAK_FLOPS: tuple[tuple[str, float | None, float], ...] = (
    (r"\bV100-SXM2\b", None, 15.7e12),  # NVIDIA V100 data sheet
    (r"\bA(100|800)\b", 312e12, 19.5e12),  # NVIDIA A100 data sheet; the A800 differs in NVLink only
    (r"\bA30\b", 165e12, 10.3e12),  # NVIDIA A30 data sheet
    (r"\bA40\b", 149.7e12, 37.4e12),  # NVIDIA A40 data sheet
    (r"\bA10\b", 125e12, 31.2e12),  # NVIDIA A10 data sheet
    (r"\bL4\b", 121e12, 30.3e12),  # NVIDIA L4 data sheet, halved from its sparse number
    (r"\bL40S\b", 362e12, 91.6e12),  # NVIDIA L40S data sheet
    (r"\bH100 PCIe\b", 756e12, 51e12),  # NVIDIA H100 data sheet, halved from its sparse number
    (r"\bH100 NVL\b", 835e12, 60e12),  # NVIDIA H100 data sheet, halved from its sparse number
    (r"\bH100\b.*\bHBM3\b", 989.4e12, 66.9e12),  # NVIDIA H100 data sheet, SXM
    (r"\bH200 NVL\b", 835e12, 60e12),  # NVIDIA H200 data sheet, halved from its sparse number
    (r"\bH200\b", 989.4e12, 66.9e12),  # NVIDIA H200 data sheet, SXM
    (r"\bGH200\b", 989.4e12, 66.9e12),  # NVIDIA GH200 data sheet
    (r"\bB200\b", 2250e12, 75e12),  # NVIDIA HGX B200 data sheet, an eighth of the board
    (r"\bMI300X\b", 1307.4e12, 163.4e12),  # AMD Instinct MI300X data sheet
)


def peak_flops_per_second(device_name: str, precision: str) -> float | None:
    """Return one device's peak dense FLOP/s, or None if unknown (CPUs, MIG slices, unlisted devices).

    Args:
        device_name: as ``torch.cuda.get_device_name()`` gives it.
        precision: "bf16" or "fp32".
    """
    if re.search(r"\bMIG\b", device_name):  # a slice of a device has a part of its peak
        return None
    for pattern, bf16, fp32 in _PEAK_FLOPS:
        if re.search(pattern, device_name):
            return {"bf16": bf16, "fp32": fp32}[precision]
    return None


class Throughput:
    """Counts tokens against the wall clock between two log records; time inside :meth:`paused` does not count."""

    def __init__(
        self,
        num_devices: int,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``peak_flops``: of one device, FLOP/s; None leaves ``throughput/mfu`` out."""
        self._num_devices = num_devices
        self._peak_flops = peak_flops
        self._clock = clock
        self._tokens = 0
        self._start = clock()

    def add(self, tokens: int) -> None:
        """Count ``tokens`` trained on, over all ranks."""
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave evaluation or checkpointing out of the measured time."""
        begin = self._clock()
        try:
            yield
        finally:
            self._start += self._clock() - begin

    def read(self, flops_per_token: float | None) -> dict[str, float]:
        """Return metrics since the last call and start the next interval; call it when the device is idle.

        Args:
            flops_per_token: forward and backward, expected under the observed routing; None: unknown, which leaves
                ``throughput/mfu`` out.
        """
        now = self._clock()
        tokens_per_second = self._tokens / max(now - self._start, 1e-9)
        self._tokens, self._start = 0, now
        per_device = tokens_per_second / self._num_devices
        metrics = {
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/tokens_per_second_per_device": per_device,
        }
        if self._peak_flops is not None and flops_per_token is not None:
            metrics["throughput/mfu"] = per_device * flops_per_token / self._peak_flops
        return metrics

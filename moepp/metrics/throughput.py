"""Tokens per second and model FLOPs utilisation (MFU)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Dense peak FLOP/s by device: (pattern of the device's name, bf16, fp32). From the vendors' documents, without sparsity
# ("halved" where a document gives the sparse number alone); bf16 with fp32 accumulation; fp32 is the plain (not TF32)
# rate, which is what torch uses by default. None: no bf16 units, or not known. What is not listed has no MFU. Each bf16
# number was found again in a second place that quotes the document, mostly torchtitan's own table with its links; what
# was not (H200 NVL), or what two cards share a name for (RTX 3080), is left out.
_PEAK_FLOPS: tuple[tuple[str, float | None, float | None], ...] = (
    (r"\bV100-SXM2\b", None, 15.7e12),  # NVIDIA V100 data sheet
    (r"\bV100-PCIE\b", None, 14e12),  # NVIDIA V100 data sheet
    (r"\bT4\b", None, 8.1e12),  # NVIDIA T4 data sheet
    (r"\bA(100|800)\b", 312e12, 19.5e12),  # NVIDIA A100 data sheet; the A800 differs in NVLink only
    (r"\bA30\b", 165e12, 10.3e12),  # NVIDIA A30 data sheet
    (r"\bA40\b", 149.7e12, 37.4e12),  # NVIDIA A40 data sheet
    (r"\bA10\b", 125e12, 31.2e12),  # NVIDIA A10 data sheet
    (r"\bL4\b", 121e12, 30.3e12),  # NVIDIA L4 data sheet, halved
    (r"\bL40\b", 181e12, 90.5e12),  # NVIDIA L40 data sheet; half of the L40S's though their chips are alike
    (r"\bL40S\b", 362e12, 91.6e12),  # NVIDIA L40S data sheet
    (r"\bH20\b", 148e12, 44e12),  # no public data sheet; NVIDIA's numbers as torchtitan has them
    (r"\bH(100|800) PCIe\b", 756e12, 51e12),  # NVIDIA H100 data sheet, halved; the H800 differs in NVLink and fp64
    (r"\bH100\b.*\bHBM2e\b", 756e12, 51e12),  # NVIDIA H100 data sheet, halved: the PCIe card's other name
    (r"\bH100 NVL\b", 835e12, 60e12),  # NVIDIA H100 data sheet, halved
    (r"\bH100\b.*\bHBM3\b", 989.4e12, 66.9e12),  # NVIDIA H100 data sheet, SXM
    (r"\bH800$", 989.4e12, 66.9e12),  # as the H100 SXM
    (r"\bH200\b(?! NVL)", 989.4e12, 66.9e12),  # NVIDIA H200 data sheet, SXM
    (r"\bGH200\b", 989.4e12, 66.9e12),  # NVIDIA GH200 data sheet
    (r"\bB200\b", 2250e12, 75e12),  # NVIDIA HGX B200 data sheet: 36 PFLOP/s with sparsity, 8 GPUs
    (r"\bGB200\b", 2500e12, 80e12),  # NVIDIA GB200 NVL72 data sheet: 360 PFLOP/s with sparsity, 72 GPUs
    (r"\bB300\b", 2250e12, 75e12),  # NVIDIA HGX B300 data sheet: 36 PFLOP/s with sparsity, 8 GPUs
    (r"\bRTX A5000$", 111.1e12, 27.8e12),  # NVIDIA RTX A5000 data sheet, halved
    (r"\bRTX A6000$", 154.8e12, 38.7e12),  # NVIDIA RTX A6000 data sheet, halved
    (r"\bRTX 6000 Ada Generation$", 364.2e12, 91.1e12),  # NVIDIA Ada architecture white paper for workstations
    (r"\bRTX 3090$", 71e12, 35.6e12),  # NVIDIA Ampere GA102 architecture white paper
    (r"\bRTX 4080$", 97.5e12, 48.7e12),  # NVIDIA Ada architecture white paper
    (r"\bRTX 4090$", 165.2e12, 82.6e12),  # NVIDIA Ada architecture white paper
    (r"\bRTX 5080$", 112.6e12, 56.3e12),  # NVIDIA RTX Blackwell architecture white paper
    (r"\bRTX 5090$", 209.5e12, 104.8e12),  # NVIDIA RTX Blackwell architecture white paper
    # AMD's matrix rates: compute units x clock x operations per clock of the CDNA white papers, as in the data sheets.
    (r"\bMI210\b", 181e12, 45.3e12),  # AMD Instinct MI210 data sheet
    (r"\bMI250X\b(?!/)", 191.5e12, 47.9e12),  # AMD Instinct MI250X data sheet, halved: torch sees each of two dies
    (r"\bMI300A\b", 980.6e12, 122.6e12),  # AMD Instinct MI300A data sheet
    (r"\bMI300X\b", 1307.4e12, 163.4e12),  # AMD Instinct MI300X data sheet
    (r"\bMI325X\b", 1307.4e12, 163.4e12),  # AMD Instinct MI325X data sheet
    (r"\bMI350X\b", 2306.9e12, 144.2e12),  # AMD Instinct MI350X product page, which rounds to 2.3 PFLOP/s
    (r"\bMI355X\b", 2516.6e12, 157.3e12),  # AMD Instinct MI355X product page, which rounds to 2.5 PFLOP/s
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

    def begin(self) -> None:
        """Start the first interval: what was done before, such as reading a checkpoint, is no training."""
        self._tokens, self._start = 0, self._clock()

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

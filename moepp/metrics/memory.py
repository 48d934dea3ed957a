"""Memory of the accelerator, as torch's allocator counts it."""

from __future__ import annotations

import torch

from moepp.metrics.values import Reduce


def memory_metrics(device: torch.device, max_reduce: Reduce) -> dict[str, float]:
    """Return the memory of the fullest rank since the last call, in bytes; nothing on the CPU.

    Every rank calls it. No device is waited for: the numbers are the host's, and are reduced in host memory.

    - ``memory/allocated_bytes``: held by tensors now.
    - ``memory/reserved_bytes``: held by the allocator now; what is above the allocated is cached or fragmented.
    - ``memory/peak_allocated_bytes``: the most that tensors held at once.
    """
    if device.type == "cpu":
        return {}
    counts = {
        "memory/allocated_bytes": torch.accelerator.memory_allocated(device),
        "memory/reserved_bytes": torch.accelerator.memory_reserved(device),
        "memory/peak_allocated_bytes": torch.accelerator.max_memory_allocated(device),
    }
    torch.accelerator.reset_peak_memory_stats(device)
    largest = max_reduce(torch.tensor(list(counts.values()), dtype=torch.int64)).tolist()
    return {name: float(value) for name, value in zip(counts, largest, strict=True)}

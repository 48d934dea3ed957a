"""Memory of the accelerator, as torch's allocator counts it, and of the host."""

from __future__ import annotations

import resource
import sys

import torch

from moepp.metrics.values import Value


def memory_values(device: torch.device) -> dict[str, Value]:
    """Return the memory since the last call, in bytes, of which the fullest rank counts; nothing on the CPU.

    No device is waited for: the numbers are the host's.

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
    return {name: Value.max(torch.tensor(count, dtype=torch.float64)) for name, count in counts.items()}


def host_memory_values() -> dict[str, Value]:
    """Return ``memory/host_peak_bytes``: the most that a rank's process held of the host's memory since it started.

    That is its resident size, without what workers and other processes hold; of the fullest rank.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but on macOS
    peak *= 1 if sys.platform == "darwin" else 1024
    return {"memory/host_peak_bytes": Value.max(torch.tensor(peak, dtype=torch.float64))}

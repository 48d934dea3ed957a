"""On which GPUs Triton's kernels have passed the proof (tests/gpu): there ``runtime.kernels=auto`` takes them."""

from __future__ import annotations

import torch

KERNELS_VERSION = 2  # raise it with every change of a kernel: what was proven before no longer counts

PROVEN: frozenset[tuple[int, tuple[int, int]]] = frozenset()
"""(KERNELS_VERSION, compute capability); the proof prints the entry to add. No GPU has run these kernels yet."""


def is_proven(device: torch.device) -> bool:
    """Return whether the kernels as they are now have passed the proof on a GPU of this capability."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return (KERNELS_VERSION, torch.cuda.get_device_capability(device)) in PROVEN

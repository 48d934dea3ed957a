"""Where tests run: on the CPU, and on the GPU where there is one that torch can use."""

from __future__ import annotations

import torch

CPU = torch.device("cpu")


def find_gpu() -> torch.device | None:
    """The first CUDA (or ROCm) device, or None.

    A CUDA build of torch names its accelerator even where no driver is; other accelerators know no float64.
    """
    return torch.device("cuda", 0) if torch.cuda.is_available() else None


def why_no_gpu() -> str:
    """The reason for skipping, in words."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} finds no GPU (driver, CUDA_VISIBLE_DEVICES)"


GPU = find_gpu()
DEVICES = [CPU] if GPU is None else [CPU, GPU]

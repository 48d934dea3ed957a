"""Kernel launches of a layer's forward and backward on the path of an accelerator, counted on the CPU.

Counted are the operations that reach torch's dispatcher, without views and allocations: each launches one kernel or
more. ``python -m tests.launches`` prints the table of docs/layer.md.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from moepp import MoEConfig, MoELayer
from moepp.distributed.sequence import SequenceParallel
from moepp.moe import ExpertParallel
from moepp.moe.summary import start_summary
from moepp.ops import use_grouped_products, use_kernels

FREE = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
    "promote_types",
)
D, F, T, LAYERS = 16, 32, 24, 12
DROPLESS = MoEConfig(8, F, 1, 1, 2, capacity_factor=None)  # 8+4, as moepp_0.6b
CONFIGS = {
    "capacity": dataclasses.replace(DROPLESS, capacity_factor=1.1),
    "dropless": DROPLESS,
    "vanilla, dropless": MoEConfig(8, F, capacity_factor=None, gating_residual=False),
}


class Launches(TorchDispatchMode):
    """Operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in FREE and name not in ("_unsafe_view", "_reshape_alias"):
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def triton_counted(calls: list[str]) -> Iterator[None]:
    """Note each of Triton's kernels as one launch, and nothing of what their interpreter does."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from moepp.ops.triton.kernels import TritonKernels

    right = TritonKernels.call

    def call(self: Any, name: str, *arguments: Any) -> None:
        calls.append(name)
        with _disable_current_modes():
            right(self, name, *arguments)

    with patch.object(TritonKernels, "call", call):
        yield


def count(cfg: MoEConfig, kernels: str = "torch") -> tuple[float, float]:
    """Launches of forward and backward per layer of a model with LAYERS of them, bf16, by torch or with Triton."""
    torch.manual_seed(0)
    by_triton = []
    layers = [MoELayer(cfg, D).to(torch.bfloat16) for _ in range(LAYERS)]
    x = torch.randn(T, D).to(torch.bfloat16).requires_grad_()
    hidden, logits, records = x, None, []
    with use_kernels(kernels), use_grouped_products(), triton_counted(by_triton):
        with Launches() as forward:
            for layer in layers:
                out = layer(hidden, logits, summarize=False)
                hidden, logits = out.hidden, out.router_logits
                records.append(out.record)
            losses, _ = start_summary(records, cfg, True, ExpertParallel(), SequenceParallel()).finish()
            aux_loss = torch.stack(losses).sum()
        forward_by_triton = len(by_triton)
        with Launches() as backward:
            torch.autograd.backward((hidden, aux_loss), (torch.ones_like(hidden), torch.ones(())))
    launches = (
        forward.by_name.total() + forward_by_triton,
        backward.by_name.total() + len(by_triton) - forward_by_triton,
    )
    return launches[0] / LAYERS, launches[1] / LAYERS


def main() -> None:
    """Print the table."""
    for name, cfg in CONFIGS.items():
        counts = [f"{number:.0f}" for kernels in ("torch", "triton") for number in count(cfg, kernels)]
        print("|", " | ".join((name, *counts)), "|")


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    main()

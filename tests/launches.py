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
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
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
REFUSED = {  # dtypes that CUDA's kernels lack and the CPU's have, in some release of torch from 2.9 on
    "_embedding_bag_per_sample_weights_backward": (torch.bfloat16,),
}
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
        for tensor in args:
            if isinstance(tensor, Tensor) and tensor.dtype in REFUSED.get(name, ()):
                raise NotImplementedError(f"CUDA's kernel of {name} does not take {tensor.dtype}")
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


@contextmanager
def float32_products(calls: list[str]) -> Iterator[None]:
    """Let products of bfloat16 be float32, or be added to it, and note each as one launch: the CPU refuses them."""
    mm, addmm = torch.mm, torch.addmm

    def widening_mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None, **others: Any) -> Tensor:
        if out_dtype is None:
            return mm(left, right, **others)
        calls.append("mm")
        with _disable_current_modes():
            return mm(left.float(), right.float())

    def widening_addmm(total: Tensor, left: Tensor, right: Tensor, *, out_dtype: Any = None, **others: Any) -> Tensor:
        if out_dtype is None:
            return addmm(total, left, right, **others)
        calls.append("addmm")
        with _disable_current_modes():
            return others["out"].add_(mm(left.float(), right.float()))

    with (
        patch("moepp.ops.matmul.adds_into_float32", lambda tensor: tensor.dtype == torch.bfloat16),
        patch("torch.mm", widening_mm),
        patch("torch.addmm", widening_addmm),
    ):
        yield


@contextmanager
def accelerator(kernels: str, calls: list[str]) -> Iterator[None]:
    """Let the layer take the way of an H100, and note the launches that do not reach the dispatcher here."""
    with ExitStack() as stack:
        stack.enter_context(use_kernels(kernels))
        stack.enter_context(use_grouped_products())
        stack.enter_context(patch("moepp.ops.grouped_swiglu.leaves_empty_groups", lambda _: False))
        stack.enter_context(float32_products(calls))
        stack.enter_context(triton_counted(calls))
        yield


def count(cfg: MoEConfig, kernels: str = "torch") -> tuple[float, float]:
    """Launches of forward and backward per layer of a model with LAYERS of them, bf16, by torch or with Triton."""
    torch.manual_seed(0)
    layers = [MoELayer(cfg, D).to(torch.bfloat16) for _ in range(LAYERS)]
    x = torch.randn(T, D).to(torch.bfloat16).requires_grad_()
    by_others: list[str] = []  # launches that do not reach the dispatcher here
    with accelerator(kernels, by_others):
        _run(layers[:1], x)  # makes the constants
        by_others.clear()
        with Launches() as forward:
            results = _run(layers, x, backward=False)
        in_forward = len(by_others)
        with Launches() as backward:
            torch.autograd.backward(*results)
    launches = (forward.by_name.total() + in_forward, backward.by_name.total() + len(by_others) - in_forward)
    return launches[0] / LAYERS, launches[1] / LAYERS


def _run(layers: list[MoELayer], x: Tensor, backward: bool = True) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """Run layers and their auxiliary losses; return outputs and gradients for them."""
    hidden, logits, records = x, None, []
    for layer in layers:
        out = layer(hidden, logits, summarize=False)
        hidden, logits = out.hidden, out.router_logits
        records.append(out.record)
    losses, _ = start_summary(records, layers[0].cfg, True, ExpertParallel(), SequenceParallel()).finish()
    with _disable_current_modes():
        results = ((hidden, torch.stack(losses).sum()), (torch.ones_like(hidden), torch.ones(())))
    if backward:
        torch.autograd.grad(results[0], [x, *(p for layer in layers for p in layer.parameters())], results[1])
    return results


def main() -> None:
    """Print the table."""
    for name, cfg in CONFIGS.items():
        counts = [f"{number:.0f}" for kernels in ("torch", "triton") for number in count(cfg, kernels)]
        print("|", " | ".join((name, *counts)), "|")


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    main()

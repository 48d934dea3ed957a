"""Kernel launches of what lies around the MoE layer, on the path of an accelerator, counted on the CPU.

Counted as in :mod:`tests.launches`. ``python -m tests.launches_dense`` prints the table of docs/gpu.md.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from moepp import MoEConfig
from moepp.config import ModelConfig
from moepp.model.transformer import Transformer, TransformerLayer
from moepp.ops import chunked_cross_entropy, use_kernels
from tests.launches import Launches, float32_products, triton_counted

D, B, S, V = 64, 2, 24, 50
LABELS = torch.arange(B * S) % V
CFG = ModelConfig(V, D, 2, 4, 2, S, MoEConfig(4, 32, 1, 1, 1), moe_layer_interval=2, dense_ffn_hidden_size=96)
Part = Callable[[Transformer, Tensor], tuple[Tensor, ...]]


def attention(model: Transformer, hidden: Tensor) -> tuple[Tensor, ...]:
    """Norm, attention, residual, norm: what precedes every feed-forward part."""
    layer = model.layers[0]
    assert isinstance(layer, TransformerLayer)
    with _disable_current_modes():  # once for all layers
        inputs = model.attention_inputs(torch.zeros(B, S, dtype=torch.int64), hidden.dtype)
    return layer.attend(hidden, inputs)


def norm(model: Transformer, hidden: Tensor) -> tuple[Tensor, ...]:
    """One RMSNorm."""
    return (model.layers[0].input_layernorm(hidden),)


def loss(model: Transformer, hidden: Tensor) -> tuple[Tensor, ...]:
    """Cross-entropy of four chunks."""
    return (chunked_cross_entropy(hidden.flatten(0, 1), model.output_weight, LABELS)[0],)


class FusedNorm(torch.autograd.Function):
    """torch's fused RMSNorm, which it has not on the CPU: one operation each way; keeps x and a number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, seen: list[str]) -> Tensor:
        ctx.seen = seen
        seen.append("rms_norm")
        with _disable_current_modes():
            inverse = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
            ctx.save_for_backward(x, weight, inverse)
            return (x * inverse * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.seen.append("rms_norm_backward")
        x, weight, _ = ctx.saved_tensors
        with _disable_current_modes():  # any values will do
            return torch.ones_like(x), torch.ones_like(weight), None, None


@contextmanager
def accelerator(kernels: str, seen: list[str]) -> Iterator[None]:
    """Let operations take the way of a GPU that adds products into float32, with Triton's kernels counted."""

    with ExitStack() as stack:
        stack.enter_context(use_kernels(kernels))
        stack.enter_context(patch("moepp.ops.rms_norm._is_fused", lambda _: True))
        stack.enter_context(float32_products(seen))
        stack.enter_context(
            patch("torch.nn.functional.rms_norm", lambda x, _, weight, eps: FusedNorm.apply(x, weight, eps, seen))
        )
        stack.enter_context(
            patch("moepp.ops.cross_entropy.log_softmax", lambda x, dtype: torch.log_softmax(x, dim=-1, dtype=dtype))
        )
        stack.enter_context(triton_counted(seen))
        yield


def count(part: Part, kernels: str) -> tuple[int, int, float]:
    """Launches of forward and backward, and bytes kept for backward per element of the input, bf16."""
    torch.manual_seed(0)
    model = Transformer(CFG).to(torch.bfloat16)
    hidden = torch.randn(B, S, D).to(torch.bfloat16).requires_grad_()
    seen, kept = [], {}
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    with accelerator(kernels, seen):

        def keep(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in weights and tensor.numel():
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with Launches() as forward, saved_tensors_hooks(keep, lambda tensor: tensor):
            out = part(model, hidden)
        forward_total = forward.by_name.total() + len(seen)
        seen.clear()
        with Launches() as backward:
            torch.autograd.backward(out, [torch.ones_like(tensor) for tensor in out])
    return forward_total, backward.by_name.total() + len(seen), sum(kept.values()) / hidden.numel()


def main() -> None:
    """Print the table."""
    choices = ["torch", "triton"] if importlib.util.find_spec("triton") else ["torch"]
    for part in (norm, attention, loss):
        for kernels in choices:
            forward, backward, kept = count(part, kernels)
            print(f"| {part.__name__} | {kernels} | {forward} | {backward} | {kept:.1f} |")


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    main()

"""What a kernel costs as a ``torch.library.custom_op``, against the same kernel in an autograd function.

Run ``python -m moepp.bench.custom_op``. The kernel is that of the gates, forward and backward, on so few tokens that
hardly anything but the call is timed.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moepp.bench.cases import CASES, make_layer, random_tokens
from moepp.bench.timing import clock_for
from moepp.moe import MoELayer
from moepp.ops.backend import require_kernels_for
from moepp.ops.gates import NORMALIZATIONS, softmax_gates

TOKENS, EXPERTS, TOP_K = 8, 12, 2
CALLS, ROUNDS = 200, 20
LAYER_TOKENS = (512, 4096)
RULE = "zero_masked"


@torch.library.custom_op("moepp_bench::gates", mutates_args=())
def custom_gates(logits_TE: Tensor, top_k: int, first_zero: int, rule: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities [T, E], chosen experts [T, K] and their weights [T, K]."""
    num_tokens, num_experts = logits_TE.shape
    probs_TE, weights_TK = torch.empty_like(logits_TE), logits_TE.new_empty(num_tokens, top_k)
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64)
    sizes = (num_tokens, num_experts, top_k, first_zero, rule)
    require_kernels_for(logits_TE).call("gates", logits_TE, probs_TE, ids_TK, weights_TK, *sizes)
    return probs_TE, ids_TK, weights_TK


@torch.library.custom_op("moepp_bench::gates_backward", mutates_args=())
def custom_gates_backward(
    probs_TE: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    grad_probs_TE: Tensor,
    grad_weights_TK: Tensor,
    first_zero: int,
    rule: int,
) -> Tensor:
    """Return the logits' gradient [T, E]."""
    grad_logits_TE = torch.empty_like(probs_TE)
    inputs = (probs_TE, ids_TK, weights_TK, grad_probs_TE, grad_weights_TK)
    sizes = (*probs_TE.shape, ids_TK.shape[1], first_zero, rule)
    require_kernels_for(probs_TE).call("gates_backward", *inputs, grad_logits_TE, *sizes)
    return grad_logits_TE


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output)
    ctx.rule = inputs[2:]


def _backward(ctx: Any, grad_probs_TE: Tensor, _: Tensor, grad_weights_TK: Tensor) -> tuple[Tensor | None, ...]:
    grads = grad_probs_TE.contiguous(), grad_weights_TK.contiguous()
    return custom_gates_backward(*ctx.saved_tensors, *grads, *ctx.rule), None, None, None


custom_gates.register_autograd(_backward, setup_context=_save)


WAYS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "autograd function": lambda logits_TE: softmax_gates(logits_TE, TOP_K, range(EXPERTS - 1, EXPERTS), RULE),
    "custom_op": lambda logits_TE: custom_gates(logits_TE, TOP_K, EXPERTS - 1, NORMALIZATIONS.index(RULE)),
}


def run_gates(way: str, logits_TE: Tensor) -> None:
    """Compute gates one way, and the logits' gradient."""
    probs_TE, _, weights_TK = WAYS[way](logits_TE)
    torch.autograd.backward((probs_TE, weights_TK), (logits_TE.detach(), logits_TE.detach()[:, :TOP_K]))


def run_layer(layer: MoELayer, x_TD: Tensor) -> None:
    """Run a layer forward and backward."""
    out = layer(x_TD)
    torch.autograd.backward((out.hidden.sum(), out.aux_loss))


def least_microseconds(call: Callable[[], None], calls: int) -> float:
    """Return the time of one call, the least of some rounds of ``calls``."""
    clock, times = clock_for(torch.device("cpu"), 1), []
    for _ in range(ROUNDS):
        start = clock()
        for _ in range(calls):
            call()
        times.append((clock() - start) / calls)
    return min(times) * 1e6


def main() -> None:
    """Print the times of both ways, and those of layers to compare with."""
    torch.set_num_threads(1)
    logits_TE = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for way in WAYS:
        print(f"{way:>24} {least_microseconds(partial(run_gates, way, logits_TE), CALLS):8.1f} us")
    for tokens in LAYER_TOKENS:
        case, cpu = CASES["quick"], torch.device("cpu")
        layer, x_TD = (
            make_layer(case, 0.75, torch.float32, cpu),
            random_tokens(tokens, case.hidden_size, torch.float32, cpu),
        )
        name = f"layer of {tokens} tokens"
        print(f"{name:>24} {least_microseconds(partial(run_layer, layer, x_TD), 1):8.1f} us")


if __name__ == "__main__":
    main()

"""Memory of one layer's forward and backward against what its sizes say.

Shapes: T tokens, D width, F expert width, S FFN slots, L slots of the busiest expert (or chunk).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from moepp.bench.cases import Case, ForcedRouting, make_layer, random_tokens
from moepp.bench.tables import Record
from moepp.moe import MoELayer
from moepp.moe.vector_experts import backward_scratch_bytes, has_vectors

MEGABYTE = 2**20


def saved_bytes(layer: MoELayer, x_TD: Tensor) -> tuple[int, Any]:
    """Bytes that autograd keeps for backward, each memory once, without parameters and the input; and the output."""
    known = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), x_TD)}
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # else its memory would be given to the next one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x_TD)
    return sum(saved.values()), out


def saved_formula(case: Case, ffn_slots: int, element_size: int) -> int:
    """Per FFN slot its row and its output (2 D), gate and up (2 F)."""
    return ffn_slots * (2 * case.hidden_size + 2 * case.ffn_hidden_size) * element_size


def peak_formula(case: Case, layer: MoELayer, num_tokens: int, ffn_slots: int, busiest: int) -> int:
    """What backward holds at its height, in the experts, beyond weights, x and the output's gradient.

    What is saved but the experts' outputs, which are no longer needed; gradients of the experts' weights; of their
    outputs and rows (2 D a slot); of x by way of the zero-computation experts, and the output (2 D a token); of one
    expert's gate and up, its activation, and its outputs' gradient transposed (3 F + D a row).
    """
    width, expert_width = case.hidden_size, case.ffn_hidden_size
    size = layer.experts.down_proj.element_size()
    gradients = sum(p.numel() for p in layer.experts.parameters())
    scratch = (3 * expert_width + width) * busiest * size
    if has_vectors(layer.experts.down_proj):  # which compute in float32
        scratch = backward_scratch_bytes(width, expert_width, busiest)
    return saved_formula(case, ffn_slots, size) + (gradients + width * (ffn_slots + 2 * num_tokens)) * size + scratch


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that torch had allocated at one time during ``work``, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler
    assert results is not None and results.kineto_results is not None
    events: list[Any] = results.kineto_results.events()  # whose nbytes torch's type stubs do not know
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def measure_memory(case: Case, tau: float | None, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Record:
    """Saved and largest memory of one forward and backward, and what the formulas say."""
    layer, x_TD = make_layer(case, tau, dtype, device), random_tokens(num_tokens, case.hidden_size, dtype, device)
    grad_TD = torch.ones_like(x_TD)
    with ForcedRouting(layer, num_tokens):
        saved, out = saved_bytes(layer, x_TD)
        slots, busiest = int(out.stats.ffn_slots), int(out.stats.load_E[: case.num_ffn].max())
        del out
        peak = peak_bytes(lambda: layer(x_TD).hidden.backward(grad_TD))
    return {
        "layer": "vanilla" if tau is None else "MoE++",
        "tau": tau,
        "ffn/token": slots / num_tokens,
        "saved MB": saved / MEGABYTE,
        "saved formula MB": saved_formula(case, slots, x_TD.element_size()) / MEGABYTE,
        "peak MB": peak / MEGABYTE,
        "peak formula MB": peak_formula(case, layer, num_tokens, slots, busiest) / MEGABYTE,
    }

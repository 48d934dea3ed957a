"""Memory of one layer's forward and backward against what its sizes say.

Shapes: T tokens, D width, F expert width, S FFN assignments, L those of the busiest expert (or chunk).
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
from moepp.ops.backend import cpu_kernels
from moepp.ops.cpu.amx_experts import backward_buffer_elements, supports_amx
from moepp.ops.cpu.avx2_experts import backward_scratch_bytes, supports_avx2
from moepp.ops.matmul import matmul_transposed, mm

MEGABYTE = 2**20


def saved_bytes(layer: MoELayer, x_TD: Tensor) -> tuple[int, Any]:
    """Return the bytes that autograd keeps for backward (no parameters, no input), and the output."""
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


def saved_formula(case: Case, layer: MoELayer, ffn_assignments: int) -> int:
    """Return the bytes saved for backward: per FFN assignment its row and output (2 D), gate and up (2 F)."""
    element_size = layer.experts.down_proj.element_size()
    return ffn_assignments * (2 * case.hidden_size + 2 * case.ffn_hidden_size) * element_size


def peak_formula(case: Case, layer: MoELayer, num_tokens: int, ffn_assignments: int, busiest: int) -> int:
    """Return the experts' peak memory in backward, beyond weights, x and the output's gradient.

    What is saved but the experts' outputs, which are no longer needed; gradients of the experts' weights; of their
    outputs and rows (2 D an assignment); the output (D a token); and :func:`expert_scratch`. Zero-computation experts
    come after them.
    """
    size, width = layer.experts.down_proj.element_size(), case.hidden_size
    gradients = sum(p.numel() for p in layer.experts.parameters())
    held = gradients + width * (ffn_assignments + num_tokens)
    return saved_formula(case, layer, ffn_assignments) + held * size + expert_scratch(layer, busiest)


def expert_scratch(layer: MoELayer, busiest: int) -> int:
    """Return the temporary bytes of one expert's backward, which depend on this CPU's kernels.

    AVX2: all in one float32 buffer. AMX: the gradients of gate and up and the activation.
    By products of torch: the same and the activation's gradient. The last two ways use torch's products, which copy
    and convert as the CPU wants it: what these need is measured by themselves, at the same sizes.
    """
    down_EDF = layer.experts.down_proj.detach()
    width, expert_width = down_EDF.shape[1:]
    if supports_amx(down_EDF.new_empty(0, width), expert_width):
        own = backward_buffer_elements(expert_width, busiest) * down_EDF.element_size()
        return own + _products_scratch(down_EDF, busiest, transposes_hidden=False)
    if supports_avx2(down_EDF):
        return backward_scratch_bytes(width, expert_width, busiest)
    activation = expert_width * busiest * down_EDF.element_size()
    # Without compiled kernels SwiGLU's gradient needs two more at a time: silu(gate) and its gradient.
    swiglu = 0 if cpu_kernels(down_EDF) else 2 * activation
    return 4 * activation + max(swiglu, _products_scratch(down_EDF, busiest, transposes_hidden=True))


def _products_scratch(down_EDF: Tensor, rows: int, transposes_hidden: bool) -> int:
    """Return the peak temporary bytes of the products that give the gradients of an expert's weights."""
    width, expert_width = down_EDF.shape[1:]
    x_RD, act_RF = down_EDF.new_zeros(rows, width), down_EDF.new_zeros(rows, expert_width)
    grad_GR, grad_RG = down_EDF.new_zeros(2 * expert_width, rows), down_EDF.new_zeros(rows, 2 * expert_width)
    grad_GD, grad_DF = down_EDF.new_zeros(2 * expert_width, width), down_EDF.new_zeros(width, expert_width)
    gate_up = (
        (lambda: matmul_transposed(grad_RG, x_RD, grad_GD))
        if transposes_hidden
        else (lambda: mm(grad_GR, x_RD, grad_GD))
    )
    return max(peak_bytes(gate_up), peak_bytes(lambda: matmul_transposed(x_RD, act_RF, grad_DF)))


def peak_bytes(work: Callable[[], object]) -> int:
    """Return torch's peak allocation during ``work``, beyond what was allocated before, bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler
    assert results is not None and results.kineto_results is not None
    events: list[Any] = results.kineto_results.events()  # whose nbytes torch's type stubs do not know
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def measure_memory(case: Case, tau: float | None, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Record:
    """Return the saved and the peak memory of one forward and backward, measured and by the formulas."""
    layer, x_TD = make_layer(case, tau, dtype, device), random_tokens(num_tokens, case.hidden_size, dtype, device)
    grad_TD = torch.ones_like(x_TD)
    with ForcedRouting(layer, num_tokens):
        saved, out = saved_bytes(layer, x_TD)
        ffn_assignments, busiest = int(out.stats.ffn_assignments), int(out.stats.load_E[: case.num_ffn].max())
        del out
        peak = peak_bytes(lambda: layer(x_TD).hidden.backward(grad_TD))
    return {
        "layer": "vanilla" if tau is None else "MoE++",
        "tau": tau,
        "ffn/token": ffn_assignments / num_tokens,
        "saved MB": saved / MEGABYTE,
        "saved formula MB": saved_formula(case, layer, ffn_assignments) / MEGABYTE,
        "peak MB": peak / MEGABYTE,
        "peak formula MB": peak_formula(case, layer, num_tokens, ffn_assignments, busiest) / MEGABYTE,
    }

"""Checks of the layer and of its operations: against the float64 oracle, against plain loops, against themselves.

Shapes: T tokens, D width, F expert width, R rows sorted by expert, E FFN experts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp import MoEConfig, ops
from moepp.ops import use_grouped_products, use_kernels
from tests.gpu.report import Place, Report, deviation, is_installed
from tests.moe_cases import (
    LEAST_MARGIN,
    TOLERANCE,
    Case,
    Choices,
    Expected,
    Observed,
    assert_agrees,
    expect,
    run_layer,
)

DTYPES = (torch.float32, torch.bfloat16)
NUM_FFN = 4  # experts 0..3; constant 4 and 5, copy 6, zero 7
NUM_EXPERTS = 8
ROUTINGS: dict[str, Choices] = {
    "an FFN expert without rows": tuple((t % 3, 4 + t % 4) for t in range(8)),
    "all tokens on one FFN expert": ((2, 6),) * 8,
    "no row for any FFN expert": tuple((4 + t % 4, 4 + (t + 1) % 4) for t in range(8)),
}
EXPERT_LIMIT = 3e-2  # bf16: of the largest entry


def kernel_sets(place: Place, report: Report) -> list[str]:
    """Kernels that operations can run here; the report says which of them cannot."""
    sets = ["torch"] if place.is_cuda else ["auto", "torch"]
    if not is_installed("triton"):
        report.skip("Triton's kernels: the package triton is not installed")
        return sets
    return [*sets, "triton"]


def check_oracle(place: Place, report: Report) -> None:
    """Outputs, losses, statistics and every gradient, with each set of kernels, in fp32 and bf16."""
    worst: dict[str, float] = {}
    sets = kernel_sets(place, report)
    for name, case, expected in _cases(place):
        for kernels in sets:
            with use_kernels(kernels):
                observed = run_layer(case, device=place.device)
            label = f"{kernels}, {name}"
            with report.part(label):
                assert_agrees(case, observed, expected)
            key = f"{kernels} {str(case.dtype).removeprefix('torch.')}"
            worst[key] = max(worst.get(key, 0.0), _worst(observed, expected))
            if "without rows" in name or "no row" in name:
                _expect_zero(report, label, observed, range(3, 4) if "without" in name else range(NUM_FFN))
    for key, value in worst.items():
        dtype = torch.bfloat16 if "bfloat16" in key else torch.float32
        report.at_most(f"largest deviation, {key}", value, TOLERANCE[dtype])
        report.note(key, value)


def _cases(place: Place) -> Iterator[tuple[str, Case, Expected]]:
    """Each with what the oracle gives, computed once for all kernels."""
    cfg = MoEConfig(
        NUM_FFN,
        place.size(256, 10),
        num_constant_experts=2,
        num_copy_experts=1,
        num_zero_experts=1,
        tau=0.6,
        balance_loss_weight=0.3,
        z_loss_weight=0.05,
    )
    counts = (0, 1, 7, 512) if place.is_cuda else (0, 7)
    for dtype in DTYPES:
        base = Case(cfg, hidden_size=place.size(128, 16), dtype=dtype)
        for capacity in (None, 0.9):
            limited = replace(base, cfg=replace(cfg, capacity_factor=capacity))
            for tokens in counts:
                yield _settled(f"T={tokens}, capacity {capacity}", limited, _random_choices(tokens))
        for name, choices in ROUTINGS.items():
            yield _settled(name, replace(base, cfg=replace(cfg, capacity_factor=None)), choices)


def _settled(name: str, case: Case, choices: Choices) -> tuple[str, Case, Expected]:
    """Another seed where rounding could decide a choice or a drop."""
    case = replace(case, choices=(choices,), tokens=(len(choices),))
    for seed in range(1, 20):
        seeded = replace(case, seed=seed)
        [expected] = expect(seeded)
        if expected.reference.margin > 3 * LEAST_MARGIN[case.dtype]:
            return f"{str(case.dtype).removeprefix('torch.')}, {name}", seeded, expected
    raise AssertionError(f"no seed settles the routing of {name}")


def _random_choices(tokens: int) -> Choices:
    pick = random.Random(tokens)
    return tuple(tuple(pick.sample(range(NUM_EXPERTS), 2)) for _ in range(tokens))


def _worst(observed: Observed, expected: Expected) -> float:
    """Largest deviation of output, logits and gradients, by the measure of :func:`tests.moe_cases.assert_agrees`."""
    pairs: list[tuple[Tensor | None, Tensor]] = [(observed.hidden, expected.reference.hidden_TD)]
    pairs += [(observed.grads[name], wanted) for name, wanted in expected.grads.items()]
    return max(_difference(found, wanted) for found, wanted in pairs)


def _difference(found: Tensor | None, wanted: Tensor) -> float:
    if found is None:
        return float("inf")
    if not wanted.numel():
        return 0.0
    scale = max(1.0, float(wanted.detach().abs().max()))
    return float((found.double() - wanted.detach()).abs().max()) / scale


def _expect_zero(report: Report, label: str, observed: Observed, experts: range) -> None:
    """torch's grouped product leaves garbage there on some cards (pytorch/pytorch#172439)."""
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        grad = observed.grads[name]
        largest = float("nan") if grad is None else float(grad[experts.start : experts.stop].abs().max())
        report.expect(f"{label}: gradient of {name} without rows", largest, "0 exactly", largest == 0.0)


def check_experts(place: Place, report: Report) -> None:
    """``grouped_swiglu`` against a loop in float32 over experts, outputs and gradients; sizes that are not aligned."""
    worst = 0.0
    for name, width, ffn_width, counts in _expert_sizes(place):
        given = _draw_experts(place.device, width, ffn_width, counts)
        found, wanted = _run_grouped(given, counts), _run_loop(given, counts)
        for part, value in found.items():
            report.close(f"{name}: {part}", value, wanted[part], EXPERT_LIMIT)
            worst = max(worst, 0.0 if value is None else deviation(value, wanted[part]))
        empty = [expert for expert, count in enumerate(counts) if count == 0]
        for part in ("gate_up", "down"):
            grad = found[f"gradient of {part}"]
            largest = 0.0 if grad is None or not empty else float(grad[empty].abs().max())
            report.expect(f"{name}: gradient of {part} of experts without rows", largest, "0 exactly", largest == 0.0)
    report.note("largest deviation", worst)
    with use_grouped_products():
        _check_grouped(place, report)


def _check_grouped(place: Place, report: Report) -> None:
    """What grouped products are given in training: rows past the counts, and weights inside a flat buffer."""
    width, ffn_width, counts = place.size(768, 32), place.size(2048, 64), [5, 0, 9, 2]
    given = _draw_experts(place.device, width, ffn_width, counts)
    plain = _run_grouped(given, counts)
    tail = given["rows"].new_full((7, width), float("nan"))
    longer = given | {name: torch.cat((given[name], tail)) for name in ("rows", "grad")}
    found = _run_grouped(longer, counts)
    for part, wanted in plain.items():
        value = found[part]
        if value is not None and part in ("output", "gradient of rows"):
            value = value[: sum(counts)]
        report.same_bits(f"rows past the counts: {part}", value, wanted)
    for offset in (1, 3):  # elements of 2 bytes: no such address is a multiple of 16
        moved = given | {name: _inside_a_buffer(given[name], offset) for name in ("gate_up", "down")}
        for part, value in _run_grouped(moved, counts).items():
            report.same_bits(f"weights at element {offset} of a buffer: {part}", value, plain[part])


def _inside_a_buffer(tensor: Tensor, offset: int) -> Tensor:
    buffer = tensor.new_empty(tensor.numel() + offset)
    return buffer[offset:].view(tensor.shape).copy_(tensor)


def _expert_sizes(place: Place) -> list[tuple[str, int, int, list[int]]]:
    """Name, D, F, rows of each expert."""
    if not place.is_cuda:
        return [("aligned", 32, 64, [5, 0, 9, 2]), ("odd sizes", 30, 15, [3, 4, 0]), ("no rows", 32, 64, [0, 0])]
    return [
        ("16,384 rows", 768, 2048, [2048] * 8),
        ("uneven", 768, 2048, [8192, 1, 0, 1024, 7, 4096, 0, 3064]),
        ("odd sizes", 60, 30, [100, 0, 33, 1]),
        ("odd rows", 1536, 4096, [13, 255, 0, 1]),
        ("no rows", 768, 2048, [0] * 8),
    ]


def _draw_experts(device: torch.device, width: int, ffn_width: int, counts: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(width + len(counts))

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, torch.bfloat16)

    return {
        "rows": draw(sum(counts), width),
        "gate_up": draw(len(counts), 2 * ffn_width, width, scale=width**-0.5),
        "down": draw(len(counts), width, ffn_width, scale=ffn_width**-0.5),
        "grad": draw(sum(counts), width),
    }


def _run_grouped(given: dict[str, Tensor], counts: list[int]) -> dict[str, Tensor | None]:
    leaves = {name: given[name].detach().requires_grad_() for name in ("rows", "gate_up", "down")}
    counts_E = torch.tensor(counts, device=given["rows"].device)
    out = ops.grouped_swiglu(leaves["rows"], counts_E, leaves["gate_up"], leaves["down"])
    out.backward(given["grad"])
    return {"output": out.detach()} | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}


def _run_loop(given: dict[str, Tensor], counts: list[int]) -> dict[str, Tensor]:
    """What the words say, in float32 and by autograd."""
    leaves = {name: given[name].float().requires_grad_() for name in ("rows", "gate_up", "down")}
    blocks: list[Any] = []
    for expert, rows in enumerate(leaves["rows"].split(counts)):
        gate, up = F.linear(rows, leaves["gate_up"][expert]).chunk(2, dim=-1)
        blocks.append(F.linear(F.silu(gate) * up, leaves["down"][expert]))
    out = torch.cat(blocks)
    grads = torch.autograd.grad(out, list(leaves.values()), given["grad"].float())
    return {"output": out.detach()} | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}

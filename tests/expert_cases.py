"""FFN experts with inputs that show a wrong row, and float64 to compare with.

Shapes: R rows ordered by expert, D width, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moepp import MoEConfig
from moepp.moe.experts import FFNExperts

BF16, FP32 = torch.bfloat16, torch.float32
KINDS = [0, 1, 15, 16, 17, 31, 32, 33, 64, 300, 700]  # rows of an expert, around the blocks of 16 and 32
# Error of a row relative to the row's norm and that of the usual row: four roundings of bfloat16, of which most average
# out; for float32 sums of some hundred terms.
TOLERANCE = {BF16: 8e-3, FP32: 1e-6}


def draw(*shape: int, dtype: torch.dtype = BF16, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def before_nan(values: Tensor) -> Tensor:
    """The same values with rows of NaN behind them in memory, which nothing may read."""
    rows = len(values)
    return torch.cat([values, values.new_full((64, *values.shape[1:]), float("nan"))])[:rows]


def make_experts(
    width: int, ffn: int, num_experts: int, dtype: torch.dtype = BF16, chunk_rows: int | None = None
) -> FFNExperts:
    experts = FFNExperts(MoEConfig(num_experts, ffn, 1, expert_chunk_rows=chunk_rows), width, num_experts)
    with torch.no_grad():
        for parameter in experts.parameters():  # gates reach the bend of silu
            parameter.copy_(draw(*parameter.shape, dtype=FP32, scale=2 * parameter.shape[-1] ** -0.5))
    return experts.to(dtype)


def inputs(width: int, counts: list[int], dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    """Rows, and the gradient of their outputs."""
    rows, grad = (before_nan(draw(sum(counts), width, dtype=dtype, seed=seed)) for seed in (1, 2))
    return rows, grad


def run(experts: FFNExperts, rows_RD: Tensor, grad_RD: Tensor, counts: list[int], path: str = "") -> dict[str, Tensor]:
    """Output and all gradients; ``path`` is the loop's backend that must have run."""
    experts.zero_grad()
    leaf = rows_RD.detach().requires_grad_()
    out = experts(leaf, torch.tensor(counts))
    function: Any = out.grad_fn
    assert not path or function.backend.__name__ == path
    out.backward(grad_RD)
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()} | {"rows": leaf.grad}
    return {"out": out.detach()} | {name: grad for name, grad in grads.items() if grad is not None}


def oracle(experts: FFNExperts, rows_RD: Tensor, grad_RD: Tensor, counts: list[int]) -> dict[str, Tensor]:
    """The same in float64, expert by expert, without any rounding on the way."""
    gate_up, down = (p.detach().double().requires_grad_() for p in (experts.gate_up_proj, experts.down_proj))
    leaf, outs = rows_RD.double().requires_grad_(), []
    for expert, x in enumerate(leaf.split(counts)):
        gate, up = (x @ gate_up[expert].t()).chunk(2, -1)
        outs.append(gate / (1 + torch.exp(-gate)) * up @ down[expert].t())
    out = torch.cat(outs)
    out.backward(grad_RD.double())
    results = {"out": out.detach(), "rows": leaf.grad, "gate_up_proj": gate_up.grad, "down_proj": down.grad}
    return {name: value for name, value in results.items() if value is not None}


def assert_close(observed: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Row by row, so that a single wrong row or entry shows; zeros must be exact."""
    assert observed.keys() == wanted.keys() and len(wanted) == 4
    for name, values in wanted.items():
        norms = values.norm(dim=-1)
        usual = norms.square().mean(-1, keepdim=True).sqrt()  # within an expert
        assert observed[name].shape == values.shape
        errors = (observed[name].double() - values).norm(dim=-1)
        wrong = ~(errors <= tolerance * (norms + usual))
        assert not wrong.any(), f"{name}: {(errors / (norms + usual)).max():.1e}, rows {wrong.nonzero()[:9].tolist()}"


def relative(observed: Tensor, wanted: Tensor) -> float:
    return float((observed.detach().double() - wanted).norm() / wanted.norm())


def assert_same(observed: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert observed.keys() == wanted.keys()
    for name, values in wanted.items():
        assert torch.equal(observed[name], values), name


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """torch fills what torch.empty() gives with NaN, so that nothing can be used unset."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

"""Check 17: attention with each kind of mask against the plain formula in float32, outputs and gradients.

Letters: B batch, Q queries, K keys, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepp import ops
from tests.gpu.report import Place, Report

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
NAMES = ("output", "gradient of q", "gradient of k", "gradient of v")


def check_attention(place: Place, report: Report) -> None:
    """Causal, causal to the last key, and within documents, by a dense mask and by FlexAttention's blocks."""
    length = place.size(1024, 32)
    documents = _documents(place, length)
    zigzag = torch.cat((torch.arange(length // 4), torch.arange(3 * length // 4, length))).to(place.device)
    middle = torch.arange(length // 4, length // 2, device=place.device)  # keys reach as far as the queries
    tail = torch.arange(length // 2, length, device=place.device)
    cases = {
        "causal": (length, length, None),
        "causal to the last key": (length // 2, length, None),
        "documents": (length, length, torch.arange(length, device=place.device)),
        "documents, a run of queries": (length // 2, length, tail),
        "documents, two runs": (length // 2, length, zigzag),
        "documents, a run in the middle": (length // 4, length // 2, middle),
    }
    for dtype, limit in LIMITS.items():
        for head_dim in (64, 128) if place.is_cuda else (16,):
            for name, (queries, keys, positions) in cases.items():
                label = f"{name}, {str(dtype).removeprefix('torch.')}, d={head_dim}"
                given = _draw(place, dtype, queries, keys, head_dim)
                wanted = _plain(given, _allowed(documents, positions, queries, keys))
                if positions is None:
                    _compare(report, label, _attend(given, None), wanted, limit)
                    continue
                dense = ops.document_mask(documents, positions, keys, head_dim, blocks=False)
                _compare(report, f"{label}, dense", _attend(given, dense), wanted, limit)
                if place.is_cuda:
                    blocks = ops.document_mask(documents, positions, keys, head_dim, blocks=True)
                    _compare(report, f"{label}, blocks", _attend(given, blocks), wanted, limit)
    with report.part("FlexAttention"):
        place.require_cuda("its gradients, and what it compiles")
        _check_recompiles(place, report, length)


def _documents(place: Place, length: int, seed: int = 0) -> Tensor:
    """Numbers of documents [B, S], of other lengths in each sequence."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.rand(2, length, generator=generator) < 8 / length
    return ends.cumsum(1).to(place.device)


def _draw(place: Place, dtype: torch.dtype, queries: int, keys: int, head_dim: int) -> list[Tensor]:
    """q [B, H, Q, d], k and v [B, G, K, d], and the gradient of the output."""
    generator = torch.Generator().manual_seed(queries + head_dim)
    shapes = [(2, 8, queries, head_dim), (2, 2, keys, head_dim), (2, 2, keys, head_dim), (2, 8, queries, head_dim)]
    return [torch.randn(shape, generator=generator).to(place.device, dtype) for shape in shapes]


def _allowed(documents_BS: Tensor, positions_Q: Tensor | None, queries: int, keys: int) -> Tensor:
    """[B, 1, Q, K]: by the words, without the code under test."""
    at = torch.arange(keys - queries, keys, device=documents_BS.device) if positions_Q is None else positions_Q
    allowed = torch.arange(keys, device=documents_BS.device)[None, :] <= at[:, None]
    if positions_Q is None:
        return allowed[None, None].expand(2, 1, queries, keys)
    return (allowed[None] & (documents_BS[:, at, None] == documents_BS[:, None, :keys]))[:, None]


def _plain(given: list[Tensor], allowed: Tensor) -> list[Tensor]:
    q, k, v = (tensor.float().requires_grad_() for tensor in given[:3])
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
    scores = (q @ wide_k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    out = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1) @ wide_v
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), given[3].float())]


def _attend(given: list[Tensor], mask: object) -> list[Tensor]:
    q, k, v = (tensor.detach().requires_grad_() for tensor in given[:3])
    out = ops.attend(q, k, v, mask)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), given[3])]


def _compare(report: Report, label: str, found: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    for name, value, right in zip(NAMES, found, wanted, strict=True):
        report.close(f"{label}: {name}", value, right, limit)


def _check_recompiles(place: Place, report: Report, length: int) -> None:
    """Other documents of the same shape compile nothing anew: a run would compile in every step."""
    from torch._dynamo.utils import counters

    positions = torch.arange(length, device=place.device)
    given = _draw(place, torch.bfloat16, length, length, 64)
    graphs = []
    for seed in range(4):
        mask = ops.document_mask(_documents(place, length, seed), positions, length, 64, blocks=True)
        _attend(given, mask)
        graphs.append(counters["stats"]["unique_graphs"])
    report.equal("graphs compiled for other documents", graphs[-1] - graphs[0], 0)

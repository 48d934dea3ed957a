"""Grouped heads meet a kernel that knows of them, or are repeated: never the formula that holds all scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moepp.ops import attention

Tensor = torch.Tensor
H, G = 4, 2


def draw(queries: int, keys: int, head: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(queries + keys)
    shapes = ((2, H, queries, head), (2, G, keys, head), (2, G, keys, head))
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("dtype", "queries", "masked", "head", "keeps_groups"),
    [
        (torch.bfloat16, 8, False, 64, True),
        (torch.bfloat16, 1, False, 64, True),  # decoding
        (torch.bfloat16, 8, False, 512, False),
        (torch.bfloat16, 8, True, 64, False),
        (torch.float32, 8, False, 64, False),
        (torch.float32, 8, True, 64, False),
    ],
)
def test_an_accelerator_gets_groups_where_flash_attention_takes_them(
    dtype, queries, masked, head, keeps_groups, monkeypatch
):
    given: list[tuple[int, bool]] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool, **_: Any) -> Tensor:
        assert key.shape == value.shape
        given.append((key.shape[1], enable_gqa))
        return torch.empty_like(query)

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    inputs = draw(queries, 8, head, dtype, "meta")  # stands for the accelerator
    mask = torch.ones(2, 1, queries, 8, dtype=torch.bool, device="meta") if masked else None
    attention.attend(*inputs, mask)
    assert given == [(G, True) if keeps_groups else (H, False)]


@pytest.mark.parametrize(("queries", "masked"), [(6, False), (6, True), (1, False), (4, False)])
def test_repeated_heads_give_what_groups_give(queries, masked, monkeypatch):
    results = []
    mask = torch.ones(queries, 6, dtype=torch.bool).tril(6 - queries)[None, None] if masked else None
    for takes_groups in (True, False):
        monkeypatch.setattr(attention, "_takes_groups", lambda *_, takes=takes_groups: takes)
        inputs = [tensor.requires_grad_() for tensor in draw(queries, 6, 8, torch.float64)]
        out = attention.attend(*inputs, mask)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    for grouped, repeated in zip(*results, strict=True):
        torch.testing.assert_close(repeated, grouped)


def test_block_masks_stay_out_of_what_is_compiled_around_them():
    """FlexAttention is compiled by itself; another batch's documents compile nothing again."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    def around(x: Tensor, mask: Any) -> Tensor:
        return attention.attend(x * 2, x, x, mask) * 3

    x, compiled = torch.randn(1, 2, 8, 16), torch.compile(around, backend=keep)
    for documents in ([0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 2, 3, 3], [0] * 8):
        numbered, positions = torch.tensor([documents]), torch.arange(8)
        blocks, tensor = (attention.document_mask(numbered, positions, 8, 16, blocks=way) for way in (True, False))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, blocks), around(x, tensor))
        calls = [node.name for graph in graphs for node in graph.graph.nodes if node.op.startswith("call")]
        assert calls == ["mul", "to", "mul"]  # before FlexAttention, and after it

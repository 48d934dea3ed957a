"""The experts' grouped products: where they are taken, what they save, and what torch's kernel may get wrong."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moepp import MoEConfig, MoELayer, ops
from moepp.bench.memory import saved_bytes
from moepp.ops import use_grouped_products, use_kernels
from moepp.ops.expert_products import Hardware, choose_products
from moepp.ops.grouped_swiglu import aligned
from tests.launches import float32_products
from tests.moe_cases import Case, assert_agrees, draw_case, expect, run_layer

Tensor = torch.Tensor
grouped_swiglu_file = importlib.import_module("moepp.ops.grouped_swiglu")  # beside the function of that name
A100, RTX_4090, H100, B200, B300, RTX_5090 = (
    Hardware("cuda", capability) for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
)
MI300, APPLE, OLD_TORCH = Hardware("rocm", (9, 4)), Hardware("mps"), Hardware("cuda", (9, 0), has_grouped_mm=False)
AMX, AVX2, PORTABLE = Hardware("cpu", cpu_experts="amx"), Hardware("cpu", cpu_experts="avx2"), Hardware("cpu")
ON_A100 = "loop (no native grouped matmul for compute capability 8.0)"
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("hardware", "dtype", "sizes", "options", "line"),
    [
        (H100, BF16, (768, 2048), {}, "grouped matmul"),
        (B200, BF16, (768, 2048), {}, "grouped matmul"),
        (B300, BF16, (1536, 4096), {}, "grouped matmul"),
        (H100, BF16, (8, 8), {}, "grouped matmul"),
        (H100, BF16, (768, 2048), {"kernels": "triton"}, "triton, grouped matmul"),
        (H100, BF16, (60, 2048), {}, "loop (hidden_size=60 is not a multiple of 8)"),
        (H100, BF16, (768, 30), {}, "loop (ffn_hidden_size=30 is not a multiple of 8)"),
        (H100, BF16, (768, 2048), {"chunk_rows": 512}, "loop (expert_chunk_rows=512)"),
        (H100, FP32, (768, 2048), {}, "loop (no native grouped matmul for float32)"),
        (H100, torch.float16, (768, 2048), {}, "loop (no native grouped matmul for float16)"),
        (A100, BF16, (768, 2048), {}, ON_A100),
        (A100, FP32, (768, 2048), {"kernels": "triton"}, "triton, " + ON_A100),
        (RTX_4090, BF16, (768, 2048), {}, "loop (no native grouped matmul for compute capability 8.9)"),
        (RTX_5090, BF16, (768, 2048), {}, "loop (no native grouped matmul for compute capability 12.0)"),
        (MI300, BF16, (768, 2048), {}, "loop (no native grouped matmul on rocm)"),
        (APPLE, BF16, (768, 2048), {}, "loop (no native grouped matmul on mps)"),
        (OLD_TORCH, BF16, (768, 2048), {}, f"loop (torch {torch.__version__} has no grouped_mm)"),
        (AMX, BF16, (768, 2048), {}, "cpu (AMX)"),
        (AVX2, FP32, (768, 2048), {"chunk_rows": 512}, "cpu (AVX2)"),
        (PORTABLE, BF16, (768, 2048), {}, "loop"),
    ],
)  # fmt: skip
def test_the_way_follows_from_the_hardware_the_type_and_the_sizes(hardware, dtype, sizes, options, line):
    chosen = choose_products(hardware, dtype, *sizes, **options)
    assert str(chosen) == line
    assert chosen.is_grouped == line.endswith("grouped matmul")


def test_this_machine_has_a_way_that_the_layer_takes():
    products = ops.expert_products(torch.device("cpu"), BF16, 64, 64)
    assert not products.is_grouped and not ops.takes_device_counts(torch.device("cpu"), BF16, 64, 64)
    with use_grouped_products():
        assert ops.expert_products(torch.device("cpu"), BF16, 64, 64).is_grouped


def worst_kernel(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
    """What torch's kernel may do: of rows and experts that no offset reaches it leaves whatever memory held."""
    assert offs.dtype == torch.int32 and all(t.data_ptr() % 16 == 0 for t in (left, right))
    ends = [0, *offs.tolist()]
    groups = [slice(start, end) for start, end in itertools.pairwise(ends)]
    if right.dim() == 3:
        out = left.new_full((len(left), right.shape[2]), torch.nan)
        for group, factor in zip(groups, right, strict=True):
            out[group] = left[group] @ factor
        return out
    assert left.stride(0) == 1 and right.stride(1) == 1, "the layout that takes groups of any size"
    out = left.new_full((len(groups), left.shape[0], right.shape[1]), torch.nan)
    for expert, group in enumerate(groups):
        if group.stop > group.start:
            out[expert] = left[:, group] @ right[group]
    return out


@contextmanager
def accelerator_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, use_kernels("torch"), use_grouped_products():
        patch.setattr(F, "grouped_mm", worst_kernel)
        yield


@pytest.mark.parametrize("seed", range(40))
def test_layers_agree_with_the_oracle_whatever_the_kernel_leaves_in_memory(seed):
    case = draw_case(3000 + seed, (torch.float64, torch.float32, BF16)[seed % 3])
    case = dataclasses.replace(case, cfg=dataclasses.replace(case.cfg, expert_chunk_rows=None))
    [expected] = expect(case)
    wide: list[str] = []
    with accelerator_path(), float32_products(wide):
        assert_agrees(case, run_layer(case), expected)
    assert bool(wide) == (case.dtype == BF16), "the router reads x without a copy in float32"


@pytest.mark.parametrize(
    ("capability", "hip", "fills", "leaves"),
    [
        ((9, 0), None, True, False),
        ((9, 0), None, False, True),
        ((10, 0), None, True, True),
        ((9, 4), "6.4", True, True),
    ],
)
def test_zeros_of_experts_without_rows_are_left_to_a_kernel_that_is_known_and_seen_to_fill_them_in(
    capability, hip, fills, leaves, monkeypatch
):
    monkeypatch.setattr(grouped_swiglu_file.torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(grouped_swiglu_file, "_fills_empty_groups", lambda device: fills)
    leaves_empty_groups = grouped_swiglu_file.leaves_empty_groups.__wrapped__
    assert leaves_empty_groups(torch.device("cuda", 0)) == leaves
    assert leaves_empty_groups(torch.device("cpu"))


@pytest.mark.parametrize(("reused", "filled"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_product_on_poisoned_memory_shows_what_a_kernel_fills_in(reused, filled, monkeypatch):
    full, made = torch.full, []

    def keep(*args: Any, **kwargs: Any) -> Tensor:
        made.append(full(*args, **kwargs))
        return made[-1]

    def kernel(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        assert offs.tolist() == [64, 64] and made[-1].isnan().all()
        out = made[-1] if reused else made[-1].clone()  # an allocator may hand it out again
        out[0] = left @ right
        if filled:
            out[1] = 0
        return out

    monkeypatch.setattr(torch, "full", keep)
    monkeypatch.setattr(F, "grouped_mm", kernel)
    assert grouped_swiglu_file._fills_empty_groups(torch.device("cpu")) == (reused and filled)


LOCAL_ONLY, ONE_EXPERT, NO_TOKENS = ((4, 6), (7, 5), (6, 7), (5, 4)), ((2, 6),) * 5, ()


@pytest.mark.parametrize("choices", [LOCAL_ONLY, ONE_EXPERT, NO_TOKENS], ids=["no FFN expert", "one", "no tokens"])
@pytest.mark.parametrize("capacity", [None, 0.9])
def test_experts_without_rows_get_zero_gradients(choices, capacity):
    cfg = MoEConfig(4, 4, 1, 1, 2, tau=0.6, capacity_factor=capacity)
    case = Case(cfg, (len(choices),), hidden_size=9, dtype=torch.float64, choices=(choices,))
    [expected] = expect(case)
    with accelerator_path():
        observed = run_layer(case)
    assert_agrees(case, observed, expected)
    chosen = {expert for pair in choices for expert in pair}
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        grad = observed.grads[name]
        assert grad is not None
        assert [bool(expert.any()) for expert in grad] == [e in chosen for e in range(4)]


@pytest.mark.parametrize("counts", [[3, 0, 7, 0], [0, 0, 0, 0], [10, 0, 0, 0], [0, 1, 0, 9]])
def test_torchs_own_product_agrees_with_a_loop_in_float64(counts):
    generator, (d, f) = torch.Generator().manual_seed(1), (16, 24)
    shapes = {"rows": (sum(counts), d), "gate_up": (4, 2 * f, d), "down": (4, d, f)}
    given = {name: torch.randn(shape, generator=generator).to(BF16) for name, shape in shapes.items()}
    grad = torch.randn(sum(counts), d, generator=generator).to(BF16)
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    with use_grouped_products():
        out = ops.grouped_swiglu(leaves["rows"], torch.tensor(counts), leaves["gate_up"], leaves["down"])
        out.backward(grad)
    wide = {name: value.double().requires_grad_() for name, value in given.items()}
    wanted = []
    for expert, x in enumerate(wide["rows"].split(counts)):
        gate, up = (x @ wide["gate_up"][expert].t()).chunk(2, dim=1)
        wanted.append((F.silu(gate) * up) @ wide["down"][expert].t())
    torch.cat(wanted).backward(grad.double())
    pairs = [(out, torch.cat(wanted)), *((leaf.grad, wide[name].grad) for name, leaf in leaves.items())]
    for found, right in pairs:
        assert found is not None and right is not None and found.shape == right.shape
        largest = max(1.0, *right.detach().abs().flatten().tolist(), 0.0)
        torch.testing.assert_close(found.double(), right, rtol=0, atol=2e-2 * largest)


def test_rows_weights_and_gradients_at_odd_addresses_are_copied():
    flat = torch.randn(1 + 8 * 16, dtype=torch.float32).to(BF16)
    odd = flat[1:].view(8, 16)
    assert odd.data_ptr() % 16 and aligned(odd).data_ptr() % 16 == 0 and torch.equal(aligned(odd), odd)
    even = flat[:128].view(8, 16)
    assert aligned(even).data_ptr() == even.data_ptr() and aligned(even.t()).is_contiguous()
    weights = torch.randn(1 + 2 * 48 * 16 + 2 * 16 * 24).to(BF16)  # as an engine's flat buffer may hold them
    gate_up, down = weights[1 : 1 + 2 * 48 * 16].view(2, 48, 16), weights[1 + 2 * 48 * 16 :].view(2, 16, 24)
    results = []
    for w1, w2, rows in ((gate_up, down, odd), (gate_up.clone(), down.clone(), odd.clone())):
        leaves = [tensor.detach().requires_grad_() for tensor in (rows, w1, w2)]
        with accelerator_path():  # which insists on addresses
            out = ops.grouped_swiglu(leaves[0], torch.tensor([5, 3]), leaves[1], leaves[2])
            out.sum().backward()  # an expanded gradient
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("capacity", [None, 1.1])
def test_saved_for_backward_are_row_gate_up_and_output_of_an_assignment(capacity):
    """2 D + 2 F elements, as bench/memory.py has it: neither silu(gate) nor the activation."""
    tokens, d, f = 96, 32, 512
    layer = MoELayer(MoEConfig(4, f, 1, 1, 2, tau=0.5, capacity_factor=capacity), d).to(BF16)
    x = torch.randn(tokens, d).to(BF16).requires_grad_()
    with use_kernels("torch"), use_grouped_products():
        found, out = saved_bytes(layer, x)
    # Without asking the device, the host knows only how many rows there can be.
    rows = tokens * 2 if capacity is None else 4 * -(-1.1 * 0.5 * tokens * 2 // (0.5 * 4 + 4))
    assert int(out.stats.ffn_assignments) <= rows
    per_row, per_token = (2 * d + 2 * f) * 2, 600  # routing numbers, whatever D and F are
    assert rows * per_row <= found <= rows * per_row + tokens * per_token
    assert tokens * per_token < rows * f * 2 * 2, "one more activation of width F would show"

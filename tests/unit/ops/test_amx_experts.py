"""Experts and router projections on tile registers agree with float64, with the same bits however they are run.

Shapes: R rows ordered by expert, D width, F expert width, E experts, T tokens, P outputs.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from moepp.bench.timing import threads
from moepp.ops import project
from moepp.ops.backend import cpu_kernels
from moepp.ops.cpu.build import Library
from tests.expert_cases import (
    BF16,
    FP32,
    KINDS,
    TOLERANCE,
    assert_close,
    assert_same,
    before_nan,
    draw,
    inputs,
    make_experts,
    nan_in_new_memory,  # noqa: F401  (a fixture)
    oracle,
    relative,
    run,
)

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


@pytest.fixture
def tiles() -> Library:
    """The compiled kernels."""
    library = cpu_kernels(torch.empty(0, dtype=BF16))
    if library is None:
        pytest.skip("no compiled kernels")
    if not library.has_amx:
        pytest.skip("this processor has no tile registers (Intel AMX)")
    return library


on_tiles = pytest.mark.usefixtures("tiles")


# ---- experts ----


@on_tiles
@pytest.mark.parametrize(
    ("width", "ffn", "counts", "chunk_rows"),
    [
        *((width, ffn, KINDS, rows) for width in (32, 96) for ffn in (32, 160) for rows in (None, 50)),
        *((96, 160, KINDS[::-1], rows) for rows in (16, 31, 32, 64, 100, 299, 1000)),
        *((96, 160, counts, rows) for counts in ([0, 300, 0], [0, 0]) for rows in (None, 90)),
        (32, 32, [3, 0, 40], 1),
        (768, 32, [900, 1], None),  # several internal chunks of backward
        (768, 2048, [33, 700], None),  # and of forward, and F in several parts
        (768, 2048, [33, 700], 290),
    ],
)
def test_outputs_and_all_gradients_agree_with_float64(width, ffn, counts, chunk_rows):
    experts = make_experts(width, ffn, len(counts), chunk_rows=chunk_rows)
    rows, grad = inputs(width, counts)
    observed, wanted = run(experts, rows, grad, counts, "AMXProducts"), oracle(experts, rows, grad, counts)
    assert_close(observed, wanted, TOLERANCE[BF16])
    with torch.no_grad():
        assert torch.equal(experts(rows, torch.tensor(counts)), observed["out"])


@pytest.mark.parametrize("chunk_rows", [None, 50, 64, 299])
@pytest.mark.parametrize(
    ("dtype", "width", "ffn"),
    [(FP32, 32, 96), (FP32, 20, 33), (BF16, 20, 32), (BF16, 32, 33)],
)
def test_other_dtypes_and_widths_take_the_loop_and_agree_with_float64(dtype, width, ffn, chunk_rows, monkeypatch):
    """Among others an expert's gradients are the sums over all of its chunks."""
    monkeypatch.setattr(importlib.import_module("moepp.ops.grouped_swiglu"), "supports_avx2", lambda _: False)
    experts = make_experts(width, ffn, len(KINDS), dtype, chunk_rows)
    rows, grad = inputs(width, KINDS, dtype)
    observed = run(experts, rows, grad, KINDS, "TorchProducts")
    assert_close(observed, oracle(experts, rows, grad, KINDS), TOLERANCE[dtype])


@on_tiles
def test_a_row_has_the_same_output_whatever_rows_are_around_it():
    experts, total = make_experts(96, 160, 2), 333
    rows, _ = inputs(96, [total])
    with torch.no_grad():
        together = experts(rows, torch.tensor([0, total]))
        for start, stop in ((0, 1), (0, 31), (15, 16), (1, 33), (17, 250), (40, 333), (332, 333)):
            part = experts(torch.cat([rows[: start % 7], rows[start:stop]]), torch.tensor([start % 7, stop - start]))
            assert torch.equal(part[start % 7 :], together[start:stop])
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        assert torch.equal(experts(rows[order], torch.tensor([0, total])), together[order])
        broken, others = rows.clone(), torch.arange(total) % 5 > 0
        broken[others] = float("nan")
        out = experts(broken, torch.tensor([0, total]))
        assert torch.equal(out[~others], together[~others]) and out[others].isnan().all()


@on_tiles
@pytest.mark.parametrize("counts", [KINDS, [300], [0, 700]], ids=str)
def test_kept_and_recomputed_hidden_values_give_the_same_bits(counts):
    rows, grad = inputs(96, counts)
    kept = run(make_experts(96, 160, len(counts)), rows, grad, counts)
    assert_same(run(make_experts(96, 160, len(counts), chunk_rows=1000), rows, grad, counts), kept)
    for chunk_rows in (32, 50):  # where only the weights' gradients are summed in another order
        chunked = run(make_experts(96, 160, len(counts), chunk_rows=chunk_rows), rows, grad, counts)
        assert_same({name: chunked[name] for name in ("out", "rows")}, {name: kept[name] for name in ("out", "rows")})


@on_tiles
@pytest.mark.parametrize("chunk_rows", [None, 100])
def test_two_threads_give_the_bits_of_one(chunk_rows):
    experts = make_experts(96, 160, len(KINDS), chunk_rows=chunk_rows)
    rows, grad = inputs(96, KINDS)
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(run(experts, rows, grad, KINDS))
    assert_close(results[1], oracle(experts, rows, grad, KINDS), TOLERANCE[BF16])
    for name in ("out", "rows"):
        assert torch.equal(results[0][name], results[1][name]), name


@on_tiles
def test_two_threads_on_wide_experts_agree_with_float64():
    """There the parts of F that are summed one after the other depend on the number of threads."""
    experts, counts = make_experts(32, 2048, 2), [290, 33]
    rows, grad = inputs(32, counts)
    alone = run(experts, rows, grad, counts)
    with threads(2):
        observed = run(experts, rows, grad, counts)
    assert torch.equal(observed["out"], alone["out"])
    assert_close(observed, oracle(experts, rows, grad, counts), TOLERANCE[BF16])


@pytest.mark.parametrize("rows", [1, 17, 33, 95])
def test_nothing_is_written_behind_the_outputs(tiles, rows):
    experts, x = make_experts(32, 96, 1), draw(rows, 32)
    out = torch.full((rows + 64, 32), 7.0, dtype=BF16)
    tiles.call("amx_expert_forward", x, experts.gate_up_proj[0], experts.down_proj[0], None, out, rows, 32, 96)
    assert torch.equal(out[:rows], experts(x, torch.tensor([rows]))) and (out[rows:] == 7).all()


@on_tiles
@pytest.mark.parametrize("count", [1, 2])
def test_torch_products_before_and_after_are_right(count):
    """oneDNN configures the tile registers for itself, differently for sizes that are not whole tiles."""
    experts, counts = make_experts(96, 160, 2), [70, 300]
    rows, grad = inputs(96, counts)
    weight = draw(52, 96, dtype=FP32)
    wanted, logits = run(experts, rows, grad, counts), project(rows, weight)
    factors = [(draw(m, k), draw(k, n)) for m, k, n in ((512, 512, 512), (200, 520, 72), (512, 512, 512))]
    with threads(count):
        for left, right in factors:
            product = left.double() @ right.double()
            for kernel in (lambda: run(experts, rows, grad, counts), lambda: {"logits": project(rows, weight)}):
                assert relative(torch.mm(left, right), product) < 3e-3
                results = kernel()
                assert relative(torch.mm(left, right), product) < 3e-3
                for name in results.keys() & {"out", "rows", "logits"}:
                    assert torch.equal(results[name], wanted.get(name, logits)), name


# ---- projections ----


def assert_rounded(observed: Tensor | None, wanted: Tensor, terms: Tensor) -> None:
    """Rounded to bfloat16 once, from a sum of terms of that total size."""
    half_ulp = torch.ldexp(torch.ones_like(wanted), torch.frexp(wanted).exponent - 9)
    assert observed is not None and ((observed.double() - wanted).abs() <= half_ulp + 2e-5 * terms).all()


@on_tiles
@pytest.mark.parametrize("width", [32, 64, 100, 768])
@pytest.mark.parametrize("outputs", [1, 4, 6, 16, 17, 52])
@pytest.mark.parametrize("of_weights", [FP32, BF16])
def test_projections_use_all_digits_of_float32_weights(outputs, width, of_weights):
    for tokens in (1, 31, 32, 33, 200, 5000) if of_weights is FP32 else (33,):
        x = before_nan(draw(tokens, width))
        weight = draw(outputs, width, dtype=FP32, scale=width**-0.5).to(of_weights).float()
        grad = before_nan(draw(tokens, outputs, dtype=FP32))
        leaves = x.detach().requires_grad_(), weight.clone().requires_grad_()
        out = project(*leaves)
        out.backward(grad)
        wide, wide_weight, wide_grad = x.double(), weight.double(), grad.double()
        assert out.dtype == FP32 and torch.equal(leaves[0], x)
        assert relative(out, wide @ wide_weight.t()) < 5e-7, tokens  # without the last of three parts 1e-6 to 1e-5
        grad_x, grad_weight = leaves[0].grad, leaves[1].grad
        assert_rounded(grad_x, wide_grad @ wide_weight, wide_grad.abs() @ wide_weight.abs())
        assert grad_weight is not None and relative(grad_weight, wide_grad.t() @ wide) < 1e-5, tokens


@on_tiles
@pytest.mark.parametrize("outputs", [6, 17])
@pytest.mark.parametrize("width", [96, 100])
def test_a_token_has_the_same_projections_whatever_tokens_are_around_it(width, outputs):
    x, weight = before_nan(draw(200, width)), draw(outputs, width, dtype=FP32)
    together = project(x, weight)
    for start, stop in ((0, 1), (31, 32), (1, 33), (17, 100), (40, 200), (199, 200)):
        assert torch.equal(project(x[start:stop], weight), together[start:stop])
    broken, others = x.clone(), torch.arange(200) % 3 > 0
    broken[others] = float("nan")
    assert torch.equal(project(broken, weight)[~others], together[~others])


@on_tiles
@pytest.mark.parametrize("width", [96, 100])
def test_projections_and_their_gradients_have_the_same_bits_on_two_threads(width):
    """Here without a later use of x."""
    x, weight, grad = draw(3001, width), draw(17, width, dtype=FP32), draw(3001, 17, dtype=FP32)
    results = []
    for count in (1, 2):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with threads(count):
            project(*leaves).backward(grad)
            results.append(project(x, weight))
        results.append(leaves[0].grad)
        assert_rounded(leaves[0].grad, grad.double() @ weight.double(), grad.double().abs() @ weight.double().abs())
        assert leaves[1].grad is not None and relative(leaves[1].grad, grad.double().t() @ x.double()) < 1e-5
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])

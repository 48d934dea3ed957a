"""Experts on vector registers agree with float64, with the same bits however they are run.

Shapes: R rows ordered by expert, D width, F expert width, E experts.
"""

from __future__ import annotations

import pytest
import torch

from moepp.bench.timing import threads
from moepp.ops.backend import cpu_kernels
from moepp.ops.cpu.avx2_experts import backward_scratch_bytes
from moepp.ops.cpu.build import Library
from tests.expert_cases import (
    BF16,
    FP32,
    KINDS,
    TOLERANCE,
    assert_close,
    assert_same,
    draw,
    inputs,
    make_experts,
    nan_in_new_memory,  # noqa: F401  (a fixture)
    oracle,
    run,
)

DTYPES = [FP32, BF16]


pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


@pytest.fixture(autouse=True)
def vectors() -> Library:
    """The compiled kernels, the same functions for both element types."""
    library = cpu_kernels(torch.empty(0))
    if library is None or not library.has_avx2_experts:
        pytest.skip("no compiled kernels, or not for AVX2 (processors with AVX-512 multiply by other means)")
    return library


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("width", "ffn", "counts", "chunk_rows"),
    [
        *((width, ffn, KINDS, rows) for width in (32, 52, 7) for ffn in (32, 105, 5) for rows in (None, 50)),
        *((96, 160, KINDS[::-1], rows) for rows in (16, 31, 32, 64, 100, 299, 1000)),
        *((96, 160, counts, rows) for counts in ([0, 300, 0], [0, 0]) for rows in (None, 90)),
        (32, 32, [3, 0, 40], 1),
        (260, 300, [700, 33, 8, 9], None),  # several blocks of both widths and of rows
        (768, 2048, [33, 300], None),
        (768, 2048, [1100], 290),  # forward computes 1,056 rows at a time
    ],
)
def test_outputs_and_all_gradients_agree_with_float64(width, ffn, counts, chunk_rows, dtype):
    experts = make_experts(width, ffn, len(counts), dtype, chunk_rows)
    rows, grad = inputs(width, counts, dtype)
    observed, wanted = run(experts, rows, grad, counts, "AVX2Products"), oracle(experts, rows, grad, counts)
    assert_close(observed, wanted, TOLERANCE[dtype])
    with torch.no_grad():
        assert torch.equal(experts(rows, torch.tensor(counts)), observed["out"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_output_whatever_rows_are_around_it(dtype):
    experts, total = make_experts(52, 105, 2, dtype), 333
    rows, _ = inputs(52, [total], dtype)
    with torch.no_grad():
        together = experts(rows, torch.tensor([0, total]))
        for start, stop in ((0, 1), (0, 31), (15, 16), (1, 33), (17, 250), (40, 333), (332, 333)):
            part = experts(torch.cat([rows[: start % 7], rows[start:stop]]), torch.tensor([start % 7, stop - start]))
            assert torch.equal(part[start % 7 :], together[start:stop])
        broken, others = rows.clone(), torch.arange(total) % 5 > 0
        broken[others] = float("nan")
        out = experts(broken, torch.tensor([0, total]))
        assert torch.equal(out[~others], together[~others]) and out[others].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [KINDS, [300], [0, 700]], ids=str)
def test_kept_and_recomputed_hidden_values_give_the_same_bits(counts, dtype):
    rows, grad = inputs(96, counts, dtype)
    kept = run(make_experts(96, 160, len(counts), dtype), rows, grad, counts)
    assert_same(run(make_experts(96, 160, len(counts), dtype, chunk_rows=1000), rows, grad, counts), kept)
    for chunk_rows in (32, 50):  # where only the weights' gradients are summed in another order
        chunked = run(make_experts(96, 160, len(counts), dtype, chunk_rows=chunk_rows), rows, grad, counts)
        assert_same({name: chunked[name] for name in ("out", "rows")}, {name: kept[name] for name in ("out", "rows")})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [None, 100])
def test_two_threads_give_the_bits_of_one(chunk_rows, dtype):
    experts, counts = make_experts(260, 400, 3, dtype, chunk_rows), [700, 33, 290]
    rows, grad = inputs(260, counts, dtype)
    alone = run(experts, rows, grad, counts)
    with threads(2):
        assert_same(run(experts, rows, grad, counts), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 17, 33, 95])
def test_nothing_is_written_behind_results_and_scratch(dtype, rows):
    library, width, ffn = cpu_kernels(torch.empty(0, dtype=dtype)), 37, 51
    assert library is not None
    experts, x = make_experts(width, ffn, 1, dtype), draw(rows, width, dtype=dtype)
    weights = (experts.gate_up_proj.detach()[0], experts.down_proj.detach()[0])
    padded = -(-rows // 16) * 16

    def room(size: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.full((size + 64,), 7.0, dtype=kind)

    hidden, out, scratch = room(padded * 2 * ffn), room(rows * width), room(padded * (width + ffn), FP32)
    library.call("avx2_expert_forward", x, *weights, hidden, out, scratch, rows, width, ffn, padded)
    assert torch.equal(out[: rows * width].view(rows, width), experts(x, torch.tensor([rows])))
    results = [room(size) for size in (rows * width, 2 * ffn * width, width * ffn)]
    work = room(backward_scratch_bytes(width, ffn, rows) // 4, FP32)
    library.call("avx2_expert_backward", x, x, hidden, *weights, *results, None, None, work, rows, width, ffn)
    for tensor in (hidden, out, scratch, work, *results):
        assert (tensor[-64:] == 7).all() and (tensor[:-64] != 7).any()

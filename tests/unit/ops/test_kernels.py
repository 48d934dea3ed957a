"""The compiled CPU kernels agree with float64 arithmetic, and the layer is the same with and without them."""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moepp import MoEConfig, MoELayer, cpu, ops
from moepp.moe.experts import ZeroComputation
from moepp.moe.gates import compute_gates
from moepp.ops import use_kernels
from moepp.ops.backend import cpu_kernels
from moepp.ops.cpu import build
from moepp.ops.cross_entropy import chunked_cross_entropy
from moepp.ops.matmul import matmul_transposed, transpose
from moepp.ops.permute import RowOrder, combine_rows, gather_rows
from moepp.ops.swiglu import swiglu, swiglu_backward
from tests.grids import pairwise

pytestmark = [
    pytest.mark.skipif(
        not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")), reason="no C compiler"
    ),
    pytest.mark.skipif(cpu.chosen() == "portable", reason="MOEPP_CPU=portable: no compiled kernels"),
]

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.bfloat16)
# Relative to the largest entry: two or three roundings of the dtype, and for float32 sums of some hundred terms.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}
WIDTHS = (1, 15, 16, 33, 96, 130)  # below, at and above the 16 lanes; multiples of the 32-wide tile and not


@pytest.fixture(scope="module", params=["native", "portable"])
def library(request, tmp_path_factory):
    """The kernels as this machine gets them, and as one without special instructions would."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "portable":
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
            patch.setattr(cpu, "chosen", lambda: None)
            patch.setattr(build, "_ATTEMPTS", (("-fopenmp",), ()))
        build.library.cache_clear()
        yield
    build.library.cache_clear()


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def assert_close(observed: Tensor, wanted: Tensor, dtype: torch.dtype, name: str = "") -> None:
    observed, wanted = observed.detach(), wanted.detach()
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    error = float((observed.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
    assert observed.shape == wanted.shape and error <= TOLERANCE[dtype] * scale, f"{name}: {error:.2e} of {scale:.2e}"


def compiled(dtype: torch.dtype) -> None:
    assert ops.describe(torch.device("cpu"), dtype) == "compiled"


@pairwise(dtype=DTYPES, rows=[1, 40], width=WIDTHS)
def test_swiglu_and_its_gradient(library, dtype, rows, width):
    compiled(dtype)
    gate_up, grad = draw(rows, 2 * width, dtype=dtype, scale=4), draw(rows, width, dtype=dtype)
    wide = gate_up.double().requires_grad_()
    wanted = F.silu(wide[:, :width]) * wide[:, width:]
    wanted.backward(grad.double())
    assert wide.grad is not None
    act, grad_gate_up = torch.empty_like(grad), torch.empty_like(gate_up)
    swiglu(gate_up[:, :width], gate_up[:, width:], act)
    assert_close(act, wanted, dtype, "act")
    act.zero_()
    swiglu_backward(gate_up, grad, grad_gate_up, act)
    assert_close(act, wanted, dtype, "act of backward")
    assert_close(grad_gate_up, wide.grad, dtype, "gradient")
    in_place = gate_up.clone()
    swiglu(in_place[:, :width], in_place[:, width:], in_place[:, :width])
    assert_close(in_place[:, :width], wanted, dtype, "in place")
    assert torch.equal(in_place[:, width:], gate_up[:, width:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_keeps_nan_and_takes_extreme_values(library, dtype):
    gate = torch.tensor([float("nan"), 200.0, -200.0, 3e38, -3e38, float("inf"), 0.0, -0.0] * 3, dtype=dtype)
    up = torch.ones_like(gate)
    act = torch.empty_like(gate).unsqueeze(0)
    swiglu(gate.unsqueeze(0), up.unsqueeze(0), act)
    wanted = torch.tensor([float("nan"), 200.0, 0.0, 3e38, 0.0, float("inf"), 0.0, 0.0] * 3, dtype=dtype)
    torch.testing.assert_close(act[0], wanted, rtol=1e-2, atol=1e-30, equal_nan=True)
    assert_nan = draw(2, 64, dtype=dtype)
    assert_nan[1, 40] = float("nan")
    act = torch.empty(2, 32, dtype=dtype)
    swiglu(assert_nan[:, :32], assert_nan[:, 32:], act)
    assert act.isnan().sum() == 1 and act[1, 8].isnan()


@pairwise(dtype=DTYPES, rows=[1, 31, 64, 100], columns=WIDTHS)
def test_transpose_also_of_a_part(library, dtype, rows, columns):
    tensor = draw(rows, columns + 3, dtype=dtype)
    out = torch.full((columns, rows + 5), 7.0, dtype=dtype)
    transpose(tensor[:, :columns], out[:, :rows])
    assert torch.equal(out[:, :rows], tensor[:, :columns].t()) and (out[:, rows:] == 7).all()
    product = torch.empty(columns, 9, dtype=dtype)
    left, right = tensor[:, :columns].contiguous(), draw(rows, 9, dtype=dtype)
    matmul_transposed(left, right, product)
    assert_close(product, left.double().t() @ right.double(), dtype)


@pairwise(dtype=DTYPES, tokens=[0, 1, 7, 18], outputs=[1, 3, 4, 6, 13, 16], width=WIDTHS)
def test_projection_and_its_gradients_added_to_those_of_other_uses(library, dtype, tokens, outputs, width):
    x, weight = draw(tokens, width, dtype=dtype), draw(outputs, width, dtype=dtype)
    grad, later = draw(tokens, outputs, seed=1), draw(tokens, width, dtype=dtype, seed=2)
    parts = x.double().requires_grad_(), weight.double().requires_grad_()
    wanted = parts[0] @ parts[1].t()
    torch.autograd.backward([wanted, parts[0] * 1], [grad.double(), later.double()])
    ours = x.clone().requires_grad_(), weight.clone().requires_grad_()
    shared = ops.share_gradient(ours[0])
    out = ops.project(shared, ours[1])
    assert out.dtype == torch.float32 and torch.equal(shared, x)
    assert_close(out, wanted, torch.float32, "projection")
    torch.autograd.backward([out, shared], [grad, later])
    for name, mine, theirs in zip(("x", "weight"), ours, parts, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert_close(mine.grad, theirs.grad, dtype, name)


def test_a_token_has_the_same_logits_whatever_its_neighbours(library):
    x, weight = draw(13, 70), draw(9, 70)
    together = ops.project(x, weight)
    for token in range(13):
        assert torch.equal(ops.project(x[token : token + 1], weight)[0], together[token])


@pairwise(dtype=DTYPES, width=WIDTHS, with_start=[True, False], top_k=[1, 3])
def test_gather_and_combine_with_all_gradients(library, dtype, width, with_start, top_k):
    tokens = 11
    experts = torch.randint(0, 6, (tokens, top_k), generator=torch.Generator().manual_seed(width))
    order = ops.sort_assignments(experts, 4)  # experts 4 and 5 are none
    rows = RowOrder(order.assignments_A[: int(order.counts_E.sum())], order.positions_TK)
    inputs = {
        "x": draw(tokens, width, dtype=dtype),
        "weights": draw(tokens, top_k),
        "start": draw(tokens, width, dtype=dtype, seed=1),
    }
    grad, factor = draw(tokens, width, dtype=dtype, seed=3), draw(width, dtype=dtype)

    def run(values: dict[str, Tensor], native: bool) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: value.requires_grad_() for name, value in values.items()}
        gathered = gather_rows(leaves["x"], rows) if native else leaves["x"][rows.token_ids_R]
        outputs = gathered * factor.to(gathered.dtype)
        if native:
            out = combine_rows(outputs, rows, leaves["weights"], leaves["start"] if with_start else None)
        else:
            weights_R = leaves["weights"].flatten()[rows.assignments_R]
            out = torch.zeros(tokens, width, dtype=torch.float64).index_add(
                0, rows.token_ids_R, outputs * weights_R.unsqueeze(-1)
            )
            out = out + leaves["start"] if with_start else out
        out.backward(grad.to(out.dtype))
        return out, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    out, grads = run({name: value.clone() for name, value in inputs.items()}, native=True)
    wanted, wanted_grads = run({name: value.double() for name, value in inputs.items()}, native=False)
    assert_close(out, wanted, dtype)
    assert set(grads) == set(wanted_grads)
    for name, value in wanted_grads.items():
        assert_close(grads[name], value, dtype, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_donated_start_is_overwritten_with_the_same_sums_and_gradients(library, dtype):
    experts = torch.tensor([[0, 4], [4, 4], [1, 3], [4, 0]])  # 4 is none
    order = ops.sort_assignments(experts, 4)
    rows = RowOrder(order.assignments_A[:4], order.positions_TK)
    values, start, grad = draw(4, 70, dtype=dtype, seed=1), draw(4, 70, dtype=dtype, seed=2), draw(4, 70, dtype=dtype)
    results = []
    for donated in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (values, draw(4, 2), start)]
        given = leaves[2] * 1  # as another operation makes it
        out = combine_rows(leaves[0], rows, leaves[1], ops.donate(given) if donated else given)
        assert (out.data_ptr() == given.data_ptr()) == donated
        assert donated or torch.equal(given, start)
        out.backward(grad)
        results.append([out.detach()] + [leaf.grad for leaf in leaves])
    for plain, in_place in zip(*results, strict=True):
        assert torch.equal(plain, in_place)


def uses_of(x: Tensor, weight: Tensor, alpha: Tensor, value: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """A sum over three operations of the layer that read x, and x as they see it."""
    x = ops.share_gradient(x) if shared else x
    ids, weights = torch.tensor([[0, 4], [3, 1], [2, 0], [4, 3]]), torch.tensor([[0.3, 0.7]] * 4)
    sorted_ids = ops.sort_assignments(ids, 3)
    order = RowOrder(sorted_ids.assignments_A[: int(sorted_ids.counts_E.sum())], sorted_ids.positions_TK)
    rows = gather_rows(x, order)
    local = ops.affine_experts(x, ids, weights, alpha, value, range(3, 5))
    factor = torch.arange(1.0, 1 + x.shape[1])
    total = (ops.project(x, weight) * 3).sum() + (rows * factor).square().sum() + (local * factor.flip(0)).sum()
    return total, x


@pytest.mark.parametrize("also_outside", [False, True])
def test_a_shared_gradient_is_the_sum_over_all_uses_of_each_backward_pass_alone(library, also_outside):
    x, weight, alpha, value = draw(4, 33).requires_grad_(), draw(6, 33).requires_grad_(), draw(1, 2, 33), draw(1, 33)

    def total(shared: bool) -> Tensor:
        out, seen = uses_of(x, weight, alpha, value, shared)
        return out + (seen.sin().sum() if also_outside else 0)

    [wanted] = torch.autograd.grad(total(shared=False), [x])
    loss = total(shared=True)
    torch.autograd.grad(loss, [weight], retain_graph=True)  # does not come to x: what it sums must not stay
    for _ in range(2):
        [found] = torch.autograd.grad(loss, [x], retain_graph=True)
        assert_close(found, wanted, torch.float32)


def gate_config(num_ffn: int, top_k: int, normalization: str) -> MoEConfig:
    return MoEConfig(num_ffn, 8, 2, 1, 2, top_k=top_k, gate_normalization=normalization)


@pairwise(
    normalization=["none", "zero_masked", "topk_softmax"],
    experts_and_k=[(1, 1), (3, 2), (9, 8), (40, 3)],
    tokens=[1, 16, 45],
)
def test_gates_and_their_gradient(library, normalization, experts_and_k, tokens):
    num_ffn, top_k = experts_and_k
    """Against the same formulas in float64, which torch carries out."""
    cfg = gate_config(num_ffn, top_k, normalization)
    logits_TE = draw(tokens, cfg.num_experts, scale=2.0)
    if tokens > 1:  # this token chooses zero experts alone
        logits_TE[1] = -torch.arange(cfg.num_experts) * 1e-3
        logits_TE[1, cfg.kind_slices["zero"]] += 30
    narrow, wide = logits_TE.clone().requires_grad_(), logits_TE.double().requires_grad_()
    ours, wanted = compute_gates(narrow, cfg), compute_gates(wide, cfg)
    assert torch.equal(ours.topk_ids_TK, wanted.topk_ids_TK)
    grads = [draw(*value.shape, seed=7) for value in (wanted.probs_TE, wanted.weights_TK)]
    torch.autograd.backward([ours.probs_TE, ours.weights_TK], grads)
    torch.autograd.backward([wanted.probs_TE, wanted.weights_TK], [grad.double() for grad in grads])
    assert narrow.grad is not None and wide.grad is not None
    for observed, expected in ((ours.probs_TE, wanted.probs_TE), (ours.weights_TK, wanted.weights_TK), (narrow, wide)):
        assert_close(observed, expected, torch.float32)
    assert_close(narrow.grad, wide.grad, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 33])
@pytest.mark.parametrize(("num_constant", "num_copy"), [(2, 1), (0, 2), (3, 0)])
def test_affine_experts_and_their_gradients(library, num_constant, num_copy, width, dtype):
    """Against the same formulas in float64, which torch carries out."""
    cfg = MoEConfig(3, 8, 2, num_copy, num_constant, top_k=2)
    tokens, experts = 50, ZeroComputation(cfg, width)
    ids_TK = torch.stack([torch.randperm(cfg.num_experts, generator=torch.manual_seed(t))[:2] for t in range(tokens)])
    weights_TK, x_TD, grad_TD = (
        draw(tokens, 2).abs(),
        draw(tokens, width, dtype=dtype),
        draw(tokens, width, dtype=dtype),
    )
    weights_TK[::7] = 0  # dropped: no output, and no gradient that anything depends on
    names = ("alpha_proj", "value") if num_constant else ()
    drawn = {name: draw(*getattr(experts, name).shape, dtype=dtype) for name in names}
    results = []
    for kind in (dtype, torch.float64):
        for name in names:
            setattr(experts, name, torch.nn.Parameter(drawn[name].to(kind)))
        x = x_TD.to(kind, copy=True).requires_grad_()
        weights = weights_TK.to(torch.promote_types(kind, torch.float32), copy=True).requires_grad_()
        out = experts(x, ids_TK, weights)
        out.backward(grad_TD.to(kind))
        found = [out, x.grad, weights.grad.masked_fill(weights_TK == 0, 0)]
        results.append(found + [getattr(experts, name).grad for name in names])
    for ours, wanted in zip(*results, strict=True):
        assert_close(ours, wanted, dtype)


@pytest.mark.parametrize("num_experts", [1, 7, 40])
@pytest.mark.parametrize("tokens", [1, 16, 45])
def test_sorting_and_counting_assignments_agree_with_torch(library, num_experts, tokens):
    for top_k in {1, min(2, num_experts), min(8, num_experts)}:
        ids_TK = torch.topk(draw(tokens, num_experts, seed=top_k), top_k).indices
        ours, counts_E = ops.sort_assignments(ids_TK, num_experts - 1), ops.count_experts(ids_TK, num_experts)
        with use_kernels("torch"):
            theirs = ops.sort_assignments(ids_TK, num_experts - 1)
        count = int(ours.counts_E.sum())
        assert torch.equal(ours.counts_E, theirs.counts_E) and torch.equal(ours.positions_TK, theirs.positions_TK)
        assert torch.equal(ours.assignments_A[:count], theirs.assignments_A[:count])
        assert torch.equal(counts_E, torch.bincount(ids_TK.flatten(), minlength=num_experts))


def test_among_equal_scores_the_lower_expert_is_chosen_and_nan_gives_distinct_experts(library):
    logits_TE = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]).repeat(20, 1)
    assert ops.softmax_gates(logits_TE, 3, range(3, 3), "none")[1].tolist() == [[1, 2, 0], [0, 1, 2]] * 20
    broken = ops.softmax_gates(torch.full((18, 5), float("nan")), 3, range(5, 5), "none")[1]
    assert all(len(set(row)) == 3 and set(row) <= set(range(5)) for row in broken.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 16, 17, 100])
def test_cross_entropy_and_its_gradient(library, dtype, vocab):
    logits, labels = draw(12, vocab, dtype=dtype, scale=3), torch.arange(12) % vocab
    logits[2] *= 30  # probabilities of almost 0 and 1
    labels[[0, 7]] = -100
    wide = logits.double().requires_grad_()
    wanted = F.cross_entropy(wide, labels, reduction="none")
    wanted.sum().backward()
    assert wide.grad is not None
    losses, library_of = torch.empty(12), cpu_kernels(logits)
    assert library_of is not None
    untouched = logits.clone()
    library_of.call("cross_entropy", untouched, labels, losses, -100, 0, 12, vocab)
    assert torch.equal(untouched, logits)
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=2e-6, atol=2e-6)
    library_of.call("cross_entropy", logits, labels, losses, -100, 1, 12, vocab)
    assert_close(logits, wide.grad, dtype)
    assert (logits[[0, 7]] == 0).all()


@pytest.mark.parametrize("label", [-1, -99, 5, 10**12])
def test_a_label_out_of_range_is_refused_before_memory_is_touched(library, label):
    with pytest.raises(IndexError, match="label"):
        chunked_cross_entropy(draw(4, 8), draw(5, 8), torch.tensor([0, 1, label, 2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [None, 24])
def test_the_layer_is_the_same_with_and_without_compiled_kernels(dtype, chunk_rows):
    cfg = MoEConfig(5, 80, 1, 1, 2, top_k=2, tau=0.5, expert_chunk_rows=chunk_rows, logits_norm_std=1.0)
    torch.manual_seed(0)
    layer = MoELayer(cfg, 96).to(dtype)
    x, prev = draw(300, 96, dtype=dtype), draw(300, cfg.num_experts)

    def run() -> dict[str, Tensor]:
        layer.zero_grad()
        x_TD = x.clone().requires_grad_()
        out = layer(x_TD, prev)
        ((out.hidden * x.flip(0)).sum() + out.aux_loss).backward()
        with torch.no_grad():
            inference = layer(x, prev).hidden
        grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
        results = {"hidden": out.hidden, "inference": inference, "aux": out.aux_loss, "x": x_TD.grad, **grads}
        return {name: value.detach() for name, value in results.items() if value is not None}

    compiled(dtype)
    ours = run()
    with use_kernels("torch"):
        theirs = run()
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        error = float((value.double() - theirs[name].double()).abs().max() / theirs[name].double().abs().max())
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5), f"{name}: {error:.1e}"
    torch.testing.assert_close(ours["inference"], ours["hidden"], rtol=0, atol=TOLERANCE[dtype] * 3)


def test_without_a_compiler_torch_takes_over_and_says_so_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CC", str(Path(tmp_path, "no-such-compiler")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="moepp"):
            layer = MoELayer(MoEConfig(2, 8, 1, 1, 1), 16)
            assert layer(draw(9, 16)).hidden.isfinite().all() and layer(draw(5, 16)).hidden.isfinite().all()
        assert ops.describe(torch.device("cpu"), torch.float32) == "torch"
        assert len(caplog.records) == 1 and "no-such-compiler" in caplog.text
    finally:
        build.library.cache_clear()


@pytest.mark.parametrize("without_compiler", [False, True])
def test_a_tokens_rows_are_added_in_float32_and_rounded_once(without_compiler):
    """1 + 3 x 1/256 in bfloat16: added one by one each 1/256 would be rounded away."""
    rows = torch.tensor([[1.0], [2**-8], [2**-8], [2**-8]], dtype=torch.bfloat16)
    order = RowOrder(torch.arange(4), torch.arange(4).view(1, 4))
    ones, x = torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    with use_kernels("torch") if without_compiler else contextlib.nullcontext():
        total = combine_rows(rows, order, ones)
        gathered = gather_rows(x, order)
        gathered.backward(rows)
    wanted = torch.tensor([[1 + 3 * 2**-8]], dtype=torch.bfloat16)
    assert torch.equal(total, wanted) and x.grad is not None and torch.equal(x.grad, wanted)

"""Triton's kernels of gates, affine experts, cross-entropy and RoPE agree with float64; offsets, order of sums, choice.

On an accelerator, or interpreted on the CPU (see conftest.py).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moepp import MoEConfig, MoELayer
from moepp.ops import affine_experts, backend, chunked_cross_entropy, rotate, softmax_gates, use_kernels
from moepp.ops.triton import cross_entropy, proven
from tests.triton_cases import DEVICE, DTYPES, assert_close, draw

pytest.importorskip("triton", reason="pip install 'moepp[triton]'")

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def triton_kernels() -> Iterator[None]:
    with use_kernels("triton"):
        yield


NORMALIZATIONS = ("none", "zero_masked", "topk_softmax")


def exact_gates(
    logits: Tensor, top_k: int, first_zero: int, normalization: str
) -> tuple[Tensor, list[list[int]], Tensor]:
    """Token by token in float64."""
    probs, ids, weights = [], [], []
    for z in logits:
        p = torch.exp(z - z.max().detach())
        p = p / p.sum()
        chosen = sorted(range(len(z)), key=lambda e: (-float(z[e].detach()), e))[:top_k]
        w = [p[e] * (not (normalization == "zero_masked" and e >= first_zero)) for e in chosen]
        total = sum(w)
        if normalization != "none" and float(total.detach()) > 0:
            w = [value / total for value in w]
        probs.append(p), ids.append(chosen), weights.append(torch.stack(w))
    return torch.stack(probs), ids, torch.stack(weights)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "first_zero"), [(1, 1, 1, 1), (7, 13, 2, 12), (300, 5, 3, 2), (5, 17, 11, 12)]
)
def test_gates_and_their_gradients(normalization, tokens, experts, top_k, first_zero):
    logits = draw(tokens, experts).requires_grad_()
    grad_probs, grad_weights = draw(tokens, experts, seed=1), draw(tokens, top_k, seed=2)
    wide = logits.detach().double().requires_grad_()
    probs, ids, weights = exact_gates(wide, top_k, first_zero, normalization)
    found = softmax_gates(logits, top_k, range(first_zero, experts), normalization)
    assert "_Gates" in type(found[0].grad_fn).__name__
    assert found[1].tolist() == ids and found[1].dtype == torch.int64
    assert_close(found[0].detach(), probs.detach(), torch.float32, "probabilities")
    assert_close(found[2].detach(), weights.detach(), torch.float32, "weights")
    for of_probs in (1.0, 0.0):  # 0: autograd gives no gradient of the probabilities
        terms = [(found[2] * grad_weights).sum(), (weights * grad_weights.double()).sum()]
        if of_probs:
            terms = [terms[0] + (found[0] * grad_probs).sum(), terms[1] + (probs * grad_probs.double()).sum()]
        [grad] = torch.autograd.grad(terms[0], logits, retain_graph=True)
        [wanted] = torch.autograd.grad(terms[1], wide, retain_graph=True)
        assert_close(grad, wanted, torch.float32, "gradient")


def test_gates_choose_the_lower_number_among_equals_and_nan_last():
    nan = float("nan")
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [nan, 1.0, nan, 0.0], [-200.0, 0.0, -200.0, -300.0]], device=DEVICE)
    _, ids, weights = softmax_gates(logits, 3, range(4, 4), "topk_softmax")
    assert ids.tolist()[0] == [1, 2, 3] and ids.tolist()[2] == [1, 0, 2]
    assert sorted(ids.tolist()[1]) == sorted(set(ids.tolist()[1]))  # no expert twice, whatever the numbers
    assert weights[0].tolist() == pytest.approx([1 / 3] * 3)
    everything = softmax_gates(torch.full((2, 5), nan, device=DEVICE), 5, range(3, 5), "zero_masked")[1]
    assert everything.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_tokens_that_chose_zero_experts_alone_keep_zeros():
    logits = torch.tensor([[0.0, 9.0, 8.0]], device=DEVICE, requires_grad=True)
    _, ids, weights = softmax_gates(logits, 2, range(1, 3), "zero_masked")
    assert ids.tolist() == [[1, 2]] and weights.tolist() == [[0.0, 0.0]]
    weights.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


AFFINE_IDS = torch.tensor(
    [[4, 6], [5, 4], [0, 7], [6, 1], [4, 5], [8, 2], [5, 6]], device=DEVICE
)  # 4, 5 constant; 6 copy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constants", [0, 1, 2])
@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (1, 1), (7, 60), (7, 300), (5, 1100)])
def test_affine_experts_and_all_gradients(dtype, tokens, width, constants):
    ids, experts = AFFINE_IDS[:tokens], range(6 - constants, 7)
    weights = draw(tokens, 2, seed=1)
    weights[min(tokens, 2) :, 0] *= torch.arange(len(weights[2:]), device=DEVICE) % 2  # some are dropped
    leaves = {"x": draw(tokens, width, dtype=dtype), "weights": weights}
    leaves |= {"alpha": (draw(constants, 2, width, seed=2) / width**0.5).to(dtype)}
    leaves |= {"value": draw(constants, width, dtype=dtype, seed=3)}
    ours = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    wide = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    rows = []
    for t in range(tokens):
        row = wide["x"][t] * 0
        for k in range(2):
            c, x, weight = int(ids[t, k]) - experts.start, wide["x"][t], wide["weights"][t, k]
            if 0 <= c < constants:
                alpha = torch.softmax(wide["alpha"][c] @ x, dim=0)
                row = row + weight * (alpha[0] * x + alpha[1] * wide["value"][c])
            elif 0 <= c < len(experts):
                row = row + weight * x
        rows.append(row)
    wanted = torch.stack(rows) if rows else wide["x"] * 1 + 0 * wide["alpha"].sum() + 0 * wide["value"].sum()
    out = affine_experts(ours["x"], ids, ours["weights"], ours["alpha"], ours["value"], experts)
    assert "_AffineExperts" in type(out.grad_fn).__name__
    grad = draw(tokens, width, dtype=dtype, seed=6)
    out.backward(grad)
    wanted.backward(grad.double())
    if tokens:
        assert_close(out.detach(), wanted.detach(), dtype, "out")
    for name, leaf in wide.items():
        found = ours[name].grad
        assert found is not None, name
        right = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        if name == "weights":  # a weight of exactly 0 may get no gradient
            right = right * (leaves["weights"] != 0)
        if right.numel():
            assert_close(found, right, dtype, name)


def test_tokens_that_chose_no_affine_expert_add_nothing_whatever_they_hold():
    x = draw(2, 8)
    x[0] = float("nan")
    ids, weights = torch.tensor([[0, 1], [2, 0]], device=DEVICE), torch.ones(2, 2, device=DEVICE)
    out = affine_experts(
        x, ids, weights, torch.zeros(0, 2, 8, device=DEVICE), torch.zeros(0, 8, device=DEVICE), range(2, 3)
    )
    assert not out[0].any() and torch.equal(out[1], x[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (7, 51), (3, 5000)])
def test_cross_entropy_and_its_gradient(dtype, tokens, vocab):
    logits, labels = (draw(tokens, vocab) * 4).to(dtype), torch.arange(tokens, device=DEVICE) * 7 % vocab
    labels[2:3] = -100
    wide = logits.double().requires_grad_()
    wanted = F.cross_entropy(wide, labels, reduction="none", ignore_index=-100)
    wanted.sum().backward()
    losses, untouched = torch.empty(tokens, device=DEVICE), logits.clone()
    call = backend.require_kernels_for(logits).call
    call("cross_entropy", untouched, labels, losses, -100, 0, tokens, vocab)
    assert torch.equal(untouched, logits)
    call("cross_entropy", logits, labels, losses, -100, 1, tokens, vocab)
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=2e-6, atol=2e-6)
    assert_close(logits, wide.grad, dtype, "gradient")
    assert not logits[2:3].any()


def test_cross_entropy_marks_labels_out_of_range_and_reads_nothing_there():
    for wrong in (-1, 51, 10**12):
        logits, labels = draw(4, 51), torch.tensor([3, wrong, 50, 0], device=DEVICE)
        losses = torch.empty(4, device=DEVICE)
        backend.require_kernels_for(logits).call("cross_entropy", logits, labels, losses, -100, 1, 4, 51)
        assert losses.isnan().tolist() == [False, True, False, False]
        assert logits.isnan().any(dim=1).tolist() == [False, True, False, False]


def loads_that_race(source: str) -> list[str]:
    """Loads of memory that the same kernel stores to, from other places than it stores, after its last reduction.

    Warps meet at reductions alone: after them one may store while another has yet to load.
    """
    found = []
    for kernel in (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)):
        calls = [node for node in ast.walk(kernel) if isinstance(node, ast.Call)]
        calls = [(ast.unparse(call.func), call) for call in calls]
        places = {ast.unparse(call.args[0]) for name, call in calls if name == "tl.store"}
        stored = {place.split(" + ")[0] for place in places}
        last = max((call.lineno for name, call in calls if name in ("tl.max", "tl.sum", "tl.min")), default=0)
        for call in (call for name, call in calls if name == "tl.load" and call.lineno > last):
            place = ast.unparse(call.args[0])
            if place.split(" + ")[0] in stored and place not in places:
                found.append(f"{kernel.name}: {place}")
    return found


def test_no_kernel_reads_elsewhere_in_memory_that_it_is_overwriting():
    kernels = sorted(Path(cross_entropy.__file__).parent.glob("*.py"))
    assert [race for path in kernels for race in loads_that_race(path.read_text())] == []
    kernel = """
def _kernel(x, loss, V):
    BEFORE
    total = tl.sum(tl.load(x + v))
    tl.store(loss, total - AFTER)
    tl.store(x + v, tl.load(x + v) - total)
"""
    load = "tl.load(x + label)"
    assert loads_that_race(kernel.replace("BEFORE", "pass").replace("AFTER", load)) == ["_kernel: x + label"]
    assert loads_that_race(kernel.replace("BEFORE", f"chosen = {load}").replace("AFTER", "chosen")) == []


def test_many_small_probabilities_beside_a_large_one_count():
    logits = 0.1 * draw(1, 40_000) - 17.2  # each below half an ulp of the largest
    logits[0, 5000] = 0.0
    exact = -torch.log_softmax(logits.double(), dim=-1)[0, 5000]
    loss, _ = chunked_cross_entropy(
        torch.ones(1, 1, device=DEVICE), logits.T.contiguous(), torch.tensor([5000], device=DEVICE)
    )
    assert 1e-4 < float(exact) < 0.1 and abs(float(loss) - float(exact)) < 1e-6


def test_rotary_is_one_kernel(monkeypatch):
    """Strides of split heads; tests/unit/ops/test_rotary.py has the values."""
    monkeypatch.setattr(Tensor, "addcmul_", None)
    x = draw(2, 5, 3, 12).transpose(1, 2).requires_grad_()
    angle = draw(1, 1, 5, 6)
    out = rotate(x, angle.cos(), angle.sin())
    with use_kernels("torch"):
        monkeypatch.undo()
        torch.testing.assert_close(out, rotate(x, angle.cos(), angle.sin()), rtol=1e-6, atol=1e-6)
    [grad] = torch.autograd.grad(out, x, out.detach())  # turns back
    torch.testing.assert_close(grad, x.detach(), rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits():
    """Memory that nobody writes to is not taken."""
    far = 2**31 + 12345
    rows = torch.empty(far // 64 + 2, 64, dtype=torch.bfloat16, device=DEVICE)
    last = len(rows) - 1
    rows[last], rows[0] = draw(64, dtype=torch.bfloat16), 0
    assert last * 64 > 2**31
    positions, weights = torch.tensor([[last, -1]], device=DEVICE), torch.ones(1, 2, device=DEVICE)
    out = torch.empty(1, 64, dtype=torch.bfloat16, device=DEVICE)
    call = backend.require_kernels_for(rows).call
    call("combine", rows, positions, weights, None, out, 1, 64, 2)
    assert torch.equal(out[0], rows[last])
    out.zero_()
    call("gather", rows, torch.tensor([2 * last + 1], device=DEVICE), out, 1, 64, 2)
    assert torch.equal(out[0], rows[last])
    grad_weights = torch.empty(1, 2, device=DEVICE)
    call("combine_backward", out, rows, positions, weights, rows, grad_weights, 1, 64, 2)
    assert float(grad_weights[0, 0]) == pytest.approx(float(out.float().square().sum()), rel=1e-5)
    stride, gate = 2**30, rows.flatten()  # three rows; both factors of an offset fit 32 bits
    act = torch.empty(3, 8, dtype=torch.bfloat16, device=DEVICE)
    for row in range(3):
        gate[row * stride : row * stride + 8] = draw(8, dtype=torch.bfloat16, seed=row)
    call("swiglu", gate, stride, gate, stride, act, 8, 3, 8)
    wide = torch.stack([draw(8, dtype=torch.bfloat16, seed=row).double() for row in range(3)])
    assert_close(act, F.silu(wide) * wide, torch.bfloat16, "act")


def test_the_same_bits_again():
    cfg = MoEConfig(4, 16, 1, 1, 2, capacity_factor=None)
    torch.manual_seed(0)
    layer, x = MoELayer(cfg, 60).to(DEVICE, torch.bfloat16), draw(20, 60, dtype=torch.bfloat16)
    results = []
    for _ in range(2):
        layer.zero_grad()
        out = layer(x).hidden
        out.sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("width", "size"), [(1, 1), (60, 64), (256, 256), (768, 256), (1536, 512), (2048, 1024), (1100, 256)]
)
def test_blocks_fit_the_width(width, size):
    from moepp.ops.triton.launch import block

    assert block(width) == size


def test_auto_takes_them_only_where_they_are_proven(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for entries, chosen in (
        ((), False),
        (((proven.KERNELS_VERSION, (9, 0)),), True),
        (((proven.KERNELS_VERSION, (8, 0)),), False),
        (((proven.KERNELS_VERSION - 1, (9, 0)),), False),
    ):
        monkeypatch.setattr(proven, "PROVEN", frozenset(entries))
        with use_kernels("auto"):
            backend.choose_kernels("auto", cuda)
            assert backend.uses_triton() == chosen
            backend.choose_kernels("torch", cuda)
            assert not backend.uses_triton()
            backend.choose_kernels("auto", torch.device("cpu"))
            assert not backend.uses_triton()

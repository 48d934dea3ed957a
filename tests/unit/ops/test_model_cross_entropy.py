"""Chunked cross-entropy against torch's, its gradients, and the memory that it must not take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moepp.ops import chunked_cross_entropy, cross_entropy, matmul, use_kernels
from moepp.ops.cross_entropy import log_softmax

TOKENS, WIDTH, VOCAB = 37, 8, 51


def make_inputs(dtype: torch.dtype, ignored: tuple[int, ...] = (0, 5, 36)):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    labels[list(ignored)] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_tokens", [1, 10, 37, 100, None])
@pytest.mark.parametrize("ignored", [(), (0, 5, 36), tuple(range(10, 20)), tuple(range(TOKENS))], ids=len)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
def test_sum_and_gradients_equal_torch(dtype, tolerance, ignored, chunk_tokens):
    hidden, weight, labels = make_inputs(dtype, ignored)
    loss, count = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert int(count) == TOKENS - len(ignored)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    scale = -0.37  # upstream gradient
    grads = torch.autograd.grad(loss * scale, (hidden, weight))
    for grad, wanted in zip(grads, torch.autograd.grad(expected * scale, (hidden, weight)), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=tolerance, atol=tolerance)


def test_second_backward_gives_the_same_gradients():
    hidden, weight, labels = make_inputs(torch.float32)
    loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=9)
    first = torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss * 3, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_gradient_of_one_input_alone(trained):
    hidden, weight, labels = make_inputs(torch.float64)
    expected = torch.autograd.grad(
        F.cross_entropy(hidden @ weight.T, labels, reduction="sum"), hidden if trained == "hidden" else weight
    )
    (weight if trained == "hidden" else hidden).requires_grad_(False)
    loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=9)
    loss.backward()
    torch.testing.assert_close((hidden if trained == "hidden" else weight).grad, expected[0])
    assert (weight if trained == "hidden" else hidden).grad is None


def test_bfloat16_softmax_and_loss_are_fp32():
    generator = torch.Generator().manual_seed(0)
    # Small halves and integers: every logit is exact in bfloat16, so only log-softmax and the sum can round.
    hidden = torch.randint(-2, 3, (TOKENS, WIDTH), generator=generator).bfloat16().requires_grad_()
    weight = (torch.randint(-2, 3, (VOCAB, WIDTH), generator=generator) / 2).bfloat16().requires_grad_()
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=5)
    loss.backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum")
    expected.backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    for found, wanted in ((hidden.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        assert (found.double() - wanted).norm() / wanted.norm() < 4e-3  # one bfloat16 rounding is at most 3.9e-3


@pytest.mark.parametrize("vocab_size", [8192, 262_144])
@pytest.mark.parametrize("place", [0, 5000])
def test_many_small_probabilities_beside_a_large_one_count(vocab_size, place):
    generator = torch.Generator().manual_seed(0)
    logits = 0.1 * torch.randn(1, vocab_size, generator=generator) - 17.2  # each below half an ulp of the largest
    logits[0, place] = 0.0
    exact = -torch.log_softmax(logits.double(), dim=-1)
    assert 1e-4 < exact[0, place] < 0.1
    # One token of width 1 whose logits are the output matrix.
    for label in (place, 1):
        loss, _ = chunked_cross_entropy(torch.ones(1, 1), logits.T.contiguous(), torch.tensor([label]))
        assert abs(float(loss) - float(exact[0, label])) < 1e-6 * max(1.0, float(exact[0, label]))
    torch.testing.assert_close(-log_softmax(logits).double(), exact, rtol=1e-6, atol=0)


def test_bfloat16_weight_gradient_is_summed_in_fp32():
    # 2,000 equal terms: a bfloat16 sum stands still after the first 256.
    hidden = torch.full((2000, 1), 0.5, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = chunked_cross_entropy(hidden, weight, torch.zeros(2000, dtype=torch.int64), chunk_tokens=1)
    loss.backward()
    assert weight.grad.flatten().tolist() == [-500.0, 500.0]


@pytest.mark.parametrize("scale", [1 / 3, 0.0007])
def test_the_upstream_gradient_is_not_rounded_to_bfloat16(scale):
    hidden, weight, labels = make_inputs(torch.bfloat16)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    (F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum") * scale).backward()
    loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=9)
    (loss * scale).backward()
    plain, _ = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=9)
    [unscaled] = torch.autograd.grad(plain, hidden)
    if not matmul.multiplies_in_float32(hidden):  # then the gradient is rounded before it is scaled
        assert torch.equal(hidden.grad, (unscaled.float() * scale).bfloat16())
    ratio = (hidden.grad.double() * unscaled.double()).sum() / unscaled.double().square().sum()
    assert abs(ratio / scale - 1) < 5e-4  # the factor in bfloat16: 0.2 % off
    for found, wanted in ((hidden.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        assert (found.double() - wanted).norm() / wanted.norm() < 8e-3


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """torch's operations, with products that add into float32 as CUDA has them."""
    addmm, used = torch.addmm, []

    def into_float32(total, left, right, *, out_dtype=None, out):
        if out_dtype is None:
            return addmm(total, left, right, out=out)
        assert out_dtype == torch.float32 == total.dtype and out is total and left.dtype == torch.bfloat16
        used.append(left.shape)
        return addmm(total, left.float(), right.float(), out=out)

    monkeypatch.setattr(torch, "addmm", into_float32)
    monkeypatch.setattr(cross_entropy, "multiplies_in_float32", lambda tensor: False)  # as old CPUs do
    monkeypatch.setattr(matmul, "adds_into_float32", lambda tensor: tensor.dtype == torch.bfloat16)
    with use_kernels("torch"):
        yield used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operations_of_an_accelerator_give_the_same(as_on_an_accelerator, dtype):
    hidden, weight, labels = make_inputs(dtype)
    loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=9)
    grads = torch.autograd.grad(loss / 3, (hidden, weight))
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    wanted = F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum")
    wanted_grads = torch.autograd.grad(wanted / 3, exact)
    assert len(as_on_an_accelerator) == (5 if dtype == torch.bfloat16 else 0)  # one per chunk
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=tolerance, atol=0)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert grad.dtype == dtype and (grad.double() - wanted_grad).norm() / wanted_grad.norm() < tolerance


def test_where_products_cannot_add_into_float32_nobody_tries(monkeypatch):
    monkeypatch.setattr(matmul, "_adds_into_float32", None)
    assert not matmul.adds_into_float32(torch.ones(2, 2, dtype=torch.bfloat16))
    monkeypatch.undo()
    assert not matmul._adds_into_float32(torch.device("cpu"), torch.bfloat16)  # the CPU refuses such a product


def test_a_label_out_of_range_on_an_accelerator_shows_without_a_wait():
    """There nobody looks at the labels: the loss and the gradients are not finite."""
    hidden, weight, labels = make_inputs(torch.float32)
    for wrong in (-1, VOCAB, 10**12):
        labels[7] = wrong
        with use_kernels("torch"):
            loss = cross_entropy._ChunkedCrossEntropy.apply(hidden, weight, labels, 9, True)
        [grad] = torch.autograd.grad(loss, hidden)
        assert loss.isnan() and grad.isnan().any(dim=1).nonzero().tolist() == [[7]]
        for kernels in ("auto", "torch"):
            with use_kernels(kernels), pytest.raises(IndexError, match="a label is neither"):
                chunked_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_what_an_ignored_token_holds_does_not_matter(kernels):
    hidden, weight, labels = make_inputs(torch.float32, ignored=(0, 5))
    with torch.no_grad():
        hidden[5] = float("nan")
    with use_kernels(kernels):
        loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=9)
        loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all()
    assert not hidden.grad[[0, 5]].any() and hidden.grad.isfinite().all()


def test_no_tokens():
    hidden, weight, labels = make_inputs(torch.float32)
    loss, count = chunked_cross_entropy(hidden[:0], weight, labels[:0])
    loss.backward()
    assert (loss.item(), int(count)) == (0.0, 0) and weight.grad is not None and not weight.grad.any()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returned, and how many matrix products ran."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("tokens", [40, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_all_tokens_are_never_held(tokens, dtype):
    vocab = 3000
    hidden = torch.randn(tokens, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 4, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    with LargestTensor() as seen:
        chunked_cross_entropy(hidden, weight, labels)[0].backward()
    assert seen.numel <= tokens * vocab / 2


def test_under_no_grad_nothing_is_computed_for_backward():
    hidden, weight, labels = make_inputs(torch.float32)
    with torch.no_grad(), LargestTensor() as seen:
        loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=10)
    assert seen.products == 4  # one per chunk
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, labels, reduction="sum").detach())


def test_logits_keep_their_precision_under_autocast():
    hidden, weight, labels = make_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = chunked_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, labels, reduction="sum"))

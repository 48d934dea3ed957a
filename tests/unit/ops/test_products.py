"""bfloat16 on a CPU that cannot multiply it: float32 products, rounded once, with gradients in the model's type.

Letters: T tokens, D and N widths, V vocabulary.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moepp.config import ModelConfig, MoEConfig
from moepp.model.init import init_parameters
from moepp.model.transformer import Transformer
from moepp.ops import matmul
from moepp.ops.cross_entropy import chunked_cross_entropy
from moepp.ops.matmul import linear, mm, multiplies_in_float32, repacks_right_factor

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(params=[True, False], ids=["can multiply", "cannot multiply"])
def has_bfloat16(request, monkeypatch) -> bool:
    """Whatever this machine can do."""
    monkeypatch.setattr(matmul, "_cpu_has_bfloat16", lambda: request.param)
    return request.param


def draw(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_rounded(observed: Tensor | None, wanted: Tensor, steps: float = 1.01) -> None:
    """Within half a unit in the last place of bfloat16, times ``steps``; sums of float32 may tip a tie."""
    assert observed is not None and observed.dtype == BF16
    half_ulp = torch.ldexp(torch.ones_like(wanted), torch.frexp(wanted).exponent - 9)
    assert ((observed.double() - wanted).abs() <= steps * half_ulp + 1e-5).all()


def test_only_bfloat16_on_a_cpu_without_it_is_multiplied_in_float32(has_bfloat16):
    assert multiplies_in_float32(torch.empty(1, dtype=BF16)) == (not has_bfloat16)
    for other in (torch.empty(1), torch.empty(1, dtype=torch.float64), torch.empty(1, dtype=BF16, device="meta")):
        assert not multiplies_in_float32(other)
    if not has_bfloat16:
        assert not repacks_right_factor(torch.empty(1, dtype=BF16))


def test_products_and_their_gradients_are_rounded_once(has_bfloat16):
    left, right = draw(33, 70), draw(70, 20)
    out = torch.empty(33, 20, dtype=BF16)
    mm(left, right, out)
    assert_rounded(out, left.double() @ right.double())
    x, weight, grad = draw(3, 11, 70).requires_grad_(), draw(20, 70).requires_grad_(), draw(3, 11, 20, seed=1)
    out = linear(x, weight)
    out.backward(grad)
    assert_rounded(out.detach(), x.detach().double() @ weight.detach().double().t())
    assert_rounded(x.grad, grad.double() @ weight.detach().double())
    assert_rounded(weight.grad, grad.flatten(0, 1).double().t() @ x.detach().flatten(0, 1).double())


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_factor_without_gradient_gets_none(has_bfloat16, frozen):
    factors = {"x": draw(5, 6).requires_grad_(), "weight": draw(4, 6).requires_grad_()}
    factors[frozen].requires_grad_(False)
    linear(factors["x"], factors["weight"]).sum().backward()
    assert factors[frozen].grad is None and all(f.grad is not None for f in factors.values() if f.requires_grad)


def test_cross_entropy_gives_gradients_in_the_models_type(has_bfloat16):
    hidden, weight = draw(50, 24).requires_grad_(), draw(40, 24).requires_grad_()
    labels = torch.arange(50) % 40
    loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=17)
    (2 * loss).backward()
    wide = SimpleNamespace(hidden=hidden.detach().double().requires_grad_(), weight=weight.detach().double())
    wide.weight.requires_grad_()
    wanted = torch.nn.functional.cross_entropy(wide.hidden @ wide.weight.t(), labels, reduction="sum")
    (2 * wanted).backward()
    assert loss.dtype == FP32 and abs(loss.item() - wanted.item()) < 0.01 * wanted.item()
    for mine, theirs in ((hidden, wide.hidden), (weight, wide.weight)):
        assert mine.grad is not None and theirs.grad is not None and mine.grad.dtype == BF16
        assert (mine.grad.double() - theirs.grad).norm() < 0.01 * theirs.grad.norm()


def test_a_model_in_bfloat16_stays_in_it_and_close_to_float32(has_bfloat16):
    moe = MoEConfig(4, 24, 1, 1, 1, capacity_factor=None)
    cfg = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=16, moe=moe)
    ids = torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(0))
    losses = {}
    for dtype in (FP32, BF16):
        model = Transformer(cfg).to(dtype)
        init_parameters(model, seed=3)
        out = model.loss(ids[:, :-1], ids[:, 1:])
        (out.ce_sum / out.num_tokens + out.aux_loss).backward()
        losses[dtype] = float(out.ce_sum / out.num_tokens)
        assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
        assert model.logits(model(ids).hidden).dtype == dtype
    assert losses[BF16] == pytest.approx(losses[FP32], rel=0.01)

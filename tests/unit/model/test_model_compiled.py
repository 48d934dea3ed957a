"""A compiled model gives what the uncompiled one does: losses, all gradients, and the same parameter names."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from moepp import MoEConfig
from moepp.config import ModelConfig
from moepp.errors import ConfigError
from moepp.model import Transformer, compiled, generate, init_parameters
from moepp.model.compiled import compile_dense_parts, require_compiler

Tensor = torch.Tensor
VOCAB = 97
MOE = MoEConfig(4, 16, 1, 1, 1, top_k=7, capacity_factor=None)  # no choice of experts hangs on rounding
CFG = ModelConfig(VOCAB, 32, 4, 4, 2, 64, MOE, moe_layer_interval=2, dense_ffn_hidden_size=40)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


def build(dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(CFG)
    init_parameters(model, seed=3)
    return model.to(dtype)


def batch(size: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * size + length)
    ids = torch.randint(VOCAB, (size, length + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def step(model: Transformer, size: int, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model.loss(*batch(size, length))
    (out.ce_sum / out.num_tokens + out.aux_loss).backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return out.ce_sum.detach(), grads


def assert_same_step(model: Transformer, plain: Transformer, size: int, length: int) -> None:
    (loss, grads), (wanted_loss, wanted) = step(model, size, length), step(plain, size, length)
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    torch.testing.assert_close(loss, wanted_loss, rtol=tolerance / 10, atol=0)
    assert set(grads) == set(wanted)
    for name, value in wanted.items():
        error = float((grads[name] - value).abs().max() / value.abs().max().clamp(min=1e-6))
        assert error <= tolerance, f"{name}: {error:.1e} at {size} x {length}"


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_loss_and_gradients_at_several_sizes():
    """Layers share what is compiled, and a size that changes stops to matter."""
    counter, model, plain = CompileCounterWithBackend("aot_eager"), build(), build()
    compile_dense_parts(model, counter)
    assert_same_step(model, plain, 2, 16)
    assert counter.frame_count == 3  # attention, dense FFN, the last norm: once for all layers
    for size in (3, 4, 6):
        assert_same_step(model, plain, size, 16)
        model.set_recompute(True)
        plain.set_recompute(True)
    assert counter.frame_count == 6  # once more, for any size, with recomputation and without


def test_evaluation_masks_and_generation():
    model, plain = build().eval(), build().eval()
    compile_dense_parts(model, "aot_eager")
    ids, _ = batch(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    with torch.no_grad():
        for attention_mask in (None, mask):
            found, wanted = (m(ids, attention_mask=attention_mask).hidden for m in (model, plain))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    found, wanted = (generate(m, ids, max_new_tokens=5, temperature=0.0) for m in (model, plain))
    assert torch.equal(found, wanted)


def test_attention_is_one_graph():
    counter, model = CompileCounterWithBackend("eager"), build()
    attend = torch.compile(model.layers[0].attend, backend=counter, fullgraph=True)
    inputs = model.attention_inputs(batch(2, 16)[0], torch.float32)
    attend(torch.randn(2, 16, 32), inputs)
    assert counter.frame_count == 1


def test_parameter_names_and_values_stay():
    model, plain = build(), build()
    compile_dense_parts(model, "eager")
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict({name: value * 2 for name, value in plain.state_dict().items()})
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter *= 2
    assert_same_step(model, plain, 2, 8)  # what is compiled sees the new values


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)], ids=str)
def test_generated_code_agrees(dtype):
    require_compiler(torch.device("cpu"))
    model, plain = build(dtype), build(dtype)
    compile_dense_parts(model)
    assert_same_step(model, plain, 2, 16)


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"C\+\+ compiler, and g\+\+ is not installed.*apt install g\+\+.*CXX"):
        require_compiler(torch.device("cpu"))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(ConfigError, match="/nowhere/c"):
        require_compiler(torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="triton"):
        require_compiler(torch.device("cuda"))


def test_a_compiler_that_fails_is_one_line(monkeypatch):
    def fail(_):
        raise RuntimeError("\nPython.h: no such file\nand more\n")

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(compiled, "_probe", fail)
    with pytest.raises(ConfigError, match=r"Python\.h.*python3-dev") as caught:
        require_compiler(torch.device("cpu"))
    assert "\n" not in str(caught.value)

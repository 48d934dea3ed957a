"""Triton's kernels agree with float64: on an accelerator, or interpreted on the CPU (see conftest.py). They compile.

Shapes: T tokens, D width, K slots of a token, R rows, F expert width, C constant experts.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moepp import MoEConfig, MoELayer, kernels
from moepp.errors import ConfigError
from moepp.moe import ffn_experts
from moepp.moe import kernels as moe_kernels
from tests.moe_cases import Case, assert_agrees, expect, run_layer

pytest.importorskip("triton", reason="pip install 'moepp[triton]'")

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2}  # the interpreter cuts bfloat16 off where devices round
WIDTHS = (1, 33, 130, 1100)  # the last one takes two blocks of columns
ROOT = Path(__file__).parents[2]
# A CUDA build of torch names its accelerator even where no driver is.
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="cases of the layer lie on the CPU, where Triton interprets")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_close(observed: Tensor | None, wanted: Tensor | None, dtype: torch.dtype, name: str) -> None:
    assert observed is not None and wanted is not None and observed.shape == wanted.shape, name
    error = (observed.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1)
    assert float(error) <= TOLERANCE[dtype], f"{name}: {float(error):.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_and_its_gradient(dtype, width):
    gate_up, grad = draw(5, 2 * width, dtype=dtype) * 4, draw(5, width, dtype=dtype)
    wide = gate_up.double().requires_grad_()
    wanted = F.silu(wide[:, :width]) * wide[:, width:]
    wanted.backward(grad.double())
    act, grad_gate_up = torch.empty_like(grad), torch.empty_like(gate_up)
    moe_kernels.swiglu(gate_up[:, :width], gate_up[:, width:], act, triton=True)
    assert_close(act, wanted.detach(), dtype, "act")
    act = grad.clone()  # it may take the gradient's place
    moe_kernels.swiglu_backward(gate_up, act, grad_gate_up, act, triton=True)
    assert_close(act, wanted.detach(), dtype, "act of backward")
    assert_close(grad_gate_up, wide.grad, dtype, "gradient")
    leaf = gate_up.clone().requires_grad_()
    out = moe_kernels.TritonSwiGLU.apply(leaf)
    out.backward(grad)
    assert_close(out.detach(), wanted.detach(), dtype, "act of the function")
    assert_close(leaf.grad, wide.grad, dtype, "gradient of the function")


POSITIONS_TK = torch.tensor([[0, 3], [-1, 1], [-1, -1], [2, -1], [5, 4], [-1, 6]], device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_constant", [None, 0, 2])
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_of_rows_and_all_gradients(dtype, num_constant, width):
    num_tokens, slots_R = len(POSITIONS_TK), POSITIONS_TK[POSITIONS_TK >= 0].argsort()
    slots_R = (POSITIONS_TK.flatten() >= 0).nonzero().flatten()[slots_R]
    order = moe_kernels.RowOrder(slots_R, POSITIONS_TK)
    leaves = {"rows": draw(7, width, dtype=dtype), "weights": draw(num_tokens, 2, seed=1)}
    if num_constant is not None:
        leaves |= {
            "x": draw(num_tokens, width, dtype=dtype, seed=2),
            "scale": draw(num_tokens, seed=3) * (torch.arange(num_tokens, device=DEVICE) != 1),
            "coefficients": draw(num_tokens, num_constant, seed=4)
            * (torch.arange(num_tokens, device=DEVICE) != 2).unsqueeze(1),
            "values": draw(num_constant, width, dtype=dtype, seed=5),
        }
    ours = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    wide = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    tokens = [
        sum((wide["weights"][t, k] * wide["rows"][p] for k, p in enumerate(row) if p >= 0), draw(width).double() * 0)
        for t, row in enumerate(POSITIONS_TK.tolist())
    ]
    wanted, affine = torch.stack(tokens), None
    if num_constant is not None:
        wanted = wanted + wide["scale"].unsqueeze(1) * wide["x"] + wide["coefficients"] @ wide["values"]
        affine = moe_kernels.Affine(ours["x"], ours["scale"], ours["coefficients"], ours["values"])
    out = moe_kernels.combine_rows(ours["rows"], order, ours["weights"], affine, triton=True)
    assert "Combine" in type(out.grad_fn).__name__
    assert_close(out.detach(), wanted.detach(), dtype, "sum")
    grad = draw(num_tokens, width, dtype=dtype, seed=6)
    out.backward(grad)
    wanted.backward(grad.double())
    unused = {"scale": leaves.get("scale") == 0, "coefficients": leaves.get("coefficients") == 0}
    for name, leaf in wide.items():
        if leaf.numel() and leaf.grad is not None:
            wanted_grad = leaf.grad.masked_fill(unused[name], 0) if name in unused else leaf.grad
            assert_close(ours[name].grad, wanted_grad, dtype, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_rows_add_their_gradients_to_that_of_the_next_use(dtype):
    x, order = (
        draw(6, 40, dtype=dtype).requires_grad_(),
        moe_kernels.RowOrder(torch.tensor([0, 3, 6, 1, 9, 8, 11], device=DEVICE), POSITIONS_TK),
    )
    rows, again = moe_kernels.gather_rows(x, order, triton=True)
    assert torch.equal(rows, x[order.token_ids_R])
    grad_rows, grad_later = draw(7, 40, dtype=dtype, seed=1), draw(6, 40, dtype=dtype, seed=2)
    torch.autograd.backward([rows, again], [grad_rows, grad_later])
    wanted = grad_later.double()
    for t, row in enumerate(POSITIONS_TK.tolist()):
        for position in row:
            if position >= 0:
                wanted[t] += grad_rows[position].double()
    assert_close(x.grad, wanted, dtype, "gradient")


@on_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fields",
    [{}, {"capacity_factor": None}, {"expert_chunk_rows": 2}, {"num_copy_experts": 0, "num_constant_experts": 0}],
)
def test_the_layer_agrees_with_the_oracle(dtype, fields):
    defaults = {"tau": 0.6, "capacity_factor": 0.7, "balance_loss_weight": 0.3, "triton_kernels": True}
    case = Case(
        MoEConfig(
            4, 5, **({"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 2} | defaults | fields)
        ),
        dtype=dtype,
    )
    [expected] = expect(case)
    assert_agrees(case, run_layer(case), expected)


@on_cpu
def test_the_grouped_products_take_them_too(monkeypatch):
    """torch emulates its grouped product on the CPU."""
    cfg = MoEConfig(4, 16, 1, 1, 1, capacity_factor=None)
    torch.manual_seed(0)
    layer = MoELayer(cfg, 16).to(torch.bfloat16)
    x, results = draw(30, 16, dtype=torch.bfloat16), []
    for triton in (False, True):
        layer.experts.triton = triton
        if triton:
            monkeypatch.setattr(ffn_experts, "has_grouped_mm", lambda _: True)
            monkeypatch.setattr(F, "silu", None)  # so that nothing else computes it
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        out = layer(leaf).hidden
        (out * x.flip(0)).sum().backward()
        grads = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
        results.append({"out": out.detach(), "x": leaf.grad} | grads)
    plain, by_triton = results
    assert set(plain) == set(by_triton)
    for name, value in plain.items():
        torch.testing.assert_close(by_triton[name], value, rtol=0, atol=3e-2 * float(value.abs().max()))


@on_cpu
def test_where_they_cannot_run_an_error_says_so(monkeypatch):
    cpu, layer = torch.device("cpu"), MoELayer(replace(MoEConfig(2, 8, 1, 1, 1), triton_kernels=True), 16)
    with pytest.raises(ConfigError, match=r"float64.*convert"):
        layer.double()(draw(3, 16).double())
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match="no compiler for the CPU"):
        layer.float()(draw(3, 16))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'moepp\[triton\]'"):
        kernels.require_triton(cpu)


@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile_for_gpus(capability, tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-m", "tests.compile_triton", str(capability)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["swiglu", "swiglu_backward", "combine", "combine", "combine_backward"]

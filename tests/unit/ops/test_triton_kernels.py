"""Triton's kernels agree with float64: on an accelerator, or interpreted on the CPU (see conftest.py). They compile.

Shapes: T tokens, D width, K assignments of a token, R rows, F expert width, C constant experts.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moepp import MoEConfig, MoELayer
from moepp.errors import ConfigError
from moepp.ops import backend, use_grouped_products, use_kernels
from moepp.ops.permute import RowOrder, combine_rows, gather_rows
from moepp.ops.swiglu import swiglu, swiglu_backward
from tests.moe_cases import Case, assert_agrees, expect, run_layer
from tests.triton_cases import DEVICE, DTYPES, assert_close, draw

pytest.importorskip("triton", reason="pip install 'moepp[triton]'")

Tensor = torch.Tensor
WIDTHS = (1, 60, 130, 1100)  # the last one takes several blocks of columns
ROOT = Path(__file__).parents[3]
on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="what Triton's interpreter is asked for on the CPU alone")


@pytest.fixture(autouse=True)
def triton_kernels() -> Iterator[None]:
    with use_kernels("triton"):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_and_its_gradient(dtype, width):
    gate_up, grad = draw(5, 2 * width, dtype=dtype) * 4, draw(5, width, dtype=dtype)
    wide = gate_up.double().requires_grad_()
    wanted = F.silu(wide[:, :width]) * wide[:, width:]
    wanted.backward(grad.double())
    act, grad_gate_up = torch.empty_like(grad), torch.empty_like(gate_up)
    swiglu(gate_up[:, :width], gate_up[:, width:], act)
    assert_close(act, wanted.detach(), dtype, "act")
    act = grad.clone()  # it may take the gradient's place
    swiglu_backward(gate_up, act, grad_gate_up, act)
    assert_close(act, wanted.detach(), dtype, "act of backward")
    assert_close(grad_gate_up, wide.grad, dtype, "gradient")


POSITIONS_TK = torch.tensor([[0, 3], [-1, 1], [-1, -1], [2, -1], [5, 4], [-1, 6]], device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_start", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_of_rows_and_all_gradients(dtype, with_start, width):
    num_tokens, order_R = len(POSITIONS_TK), POSITIONS_TK[POSITIONS_TK >= 0].argsort()
    order = RowOrder((POSITIONS_TK.flatten() >= 0).nonzero().flatten()[order_R], POSITIONS_TK)
    leaves = {"rows": draw(7, width, dtype=dtype), "weights": draw(num_tokens, 2, seed=1)}
    if with_start:
        leaves["start"] = draw(num_tokens, width, dtype=dtype, seed=2)
    ours = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    wide = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    tokens = [
        sum((wide["weights"][t, k] * wide["rows"][p] for k, p in enumerate(row) if p >= 0), draw(width).double() * 0)
        for t, row in enumerate(POSITIONS_TK.tolist())
    ]
    wanted = torch.stack(tokens) + (wide["start"] if with_start else 0)
    out = combine_rows(ours["rows"], order, ours["weights"], ours.get("start"))
    assert "Combine" in type(out.grad_fn).__name__
    assert_close(out.detach(), wanted.detach(), dtype, "sum")
    grad = draw(num_tokens, width, dtype=dtype, seed=6)
    out.backward(grad)
    wanted.backward(grad.double())
    for name, leaf in wide.items():
        assert leaf.grad is not None
        assert_close(ours[name].grad, leaf.grad, dtype, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_rows_sum_their_gradients_by_token(dtype):
    x = draw(6, 40, dtype=dtype).requires_grad_()
    order = RowOrder(torch.tensor([0, 3, 6, 1, 9, 8, 11], device=DEVICE), POSITIONS_TK)
    rows = gather_rows(x, order)
    assert torch.equal(rows, x[order.token_ids_R])
    grad_rows = draw(7, 40, dtype=dtype, seed=1)
    rows.backward(grad_rows)
    wanted = torch.zeros(6, 40, dtype=torch.float64, device=DEVICE)
    for t, row in enumerate(POSITIONS_TK.tolist()):
        for position in row:
            if position >= 0:
                wanted[t] += grad_rows[position].double()
    assert_close(x.grad, wanted, dtype, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fields",
    [{}, {"capacity_factor": None}, {"expert_chunk_rows": 2}, {"num_copy_experts": 0, "num_constant_experts": 0}],
)
def test_the_layer_agrees_with_the_oracle(dtype, fields):
    defaults = {"tau": 0.6, "capacity_factor": 0.7, "balance_loss_weight": 0.3}
    case = Case(
        MoEConfig(
            4, 5, **({"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 2} | defaults | fields)
        ),
        dtype=dtype,
    )
    [expected] = expect(case)
    assert_agrees(case, run_layer(case, device=DEVICE), expected)


def test_the_grouped_products_take_them_too(monkeypatch):
    """torch emulates its grouped product on the CPU."""
    cfg = MoEConfig(4, 16, 1, 1, 1, capacity_factor=None)
    torch.manual_seed(0)
    layer = MoELayer(cfg, 16).to(DEVICE, torch.bfloat16)
    x, results = draw(30, 16, dtype=torch.bfloat16), []
    for kernels in ("auto", "triton"):
        if kernels == "triton":
            monkeypatch.setattr(F, "silu", None)  # so that nothing else computes it
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with use_kernels(kernels), use_grouped_products() if kernels == "triton" else nullcontext():
            out = layer(leaf).hidden
            (out * x.flip(0)).sum().backward()
        grads = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
        results.append({"out": out.detach(), "x": leaf.grad} | grads)
    plain, by_triton = results
    assert set(plain) == set(by_triton)
    for name, value in plain.items():
        torch.testing.assert_close(by_triton[name], value, rtol=0, atol=3e-2 * float(value.abs().max()))


@on_cpu
def test_where_they_cannot_run_an_error_says_so(monkeypatch, request):
    cpu, layer = torch.device("cpu"), MoELayer(MoEConfig(2, 8, 1, 1, 1), 16)
    with pytest.raises(ConfigError, match=r"float64.*convert"):
        layer.double()(draw(3, 16).double())
    request.getfixturevalue("without_interpreter")
    with pytest.raises(ConfigError, match="no compiler for the CPU"):
        layer.float()(draw(3, 16))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'moepp\[triton\]'"):
        backend.choose_kernels("triton", cpu)


@pytest.mark.parametrize(
    "arguments",
    [
        ("90",),
        *(pytest.param(case, marks=pytest.mark.slow) for case in [("80",), ("100",), ("90", "*fp32")]),
    ],
    ids=" ".join,
)
def test_they_compile_for_gpus(arguments, tmp_path_factory, two_at_a_time):
    from moepp.ops.triton.kernels import KERNELS

    def compiled(arguments: tuple[str, ...]) -> set[str]:
        cache = str(tmp_path_factory.mktemp("triton"))
        environment = {"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": cache, "PYTHONPATH": ":".join(sys.path)}
        command = [sys.executable, "-m", "tests.compile_triton", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    assert two_at_a_time("arguments", compiled) == set(KERNELS)


def test_gathered_rows_beyond_those_of_assignments_stay_out_of_the_gradients():
    """Where the number of rows is known to the device alone, rows follow that belong to nobody."""
    x = draw(6, 40).requires_grad_()
    order = RowOrder(torch.tensor([0, 3, 6, 1, 9, 8, 11, 2, 4], device=DEVICE), POSITIONS_TK)
    rows = gather_rows(x, order)
    assert torch.equal(rows, x[order.token_ids_R])
    grad_rows = draw(9, 40, seed=1)
    with torch.no_grad():
        clean = grad_rows.clone()
        grad_rows[7:] = float("nan")
    rows.backward(grad_rows)
    assert x.grad is not None and x.grad.isfinite().all()
    wanted = sum((clean[p] for p in POSITIONS_TK[4].tolist()), torch.zeros(40, device=DEVICE))
    assert_close(x.grad[4], wanted, torch.float32, "gradient")

"""The MoE layer on one process agrees with the oracle: outputs, every gradient, losses, drops and statistics.

On the CPU, and on the GPU where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moepp import MoEConfig
from tests.moe_cases import Case, assert_agrees, draw_case, expect, run_layer

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def config(ffn: int, constant: int = 0, copy: int = 0, zero: int = 0, **fields: Any) -> MoEConfig:
    """A small layer; loss weights large enough that a wrong auxiliary loss shows in every gradient of the router."""
    defaults: dict[str, Any] = {"ffn_hidden_size": 4, "balance_loss_weight": 0.3, "z_loss_weight": 0.05, "tau": 0.6}
    return MoEConfig(
        num_ffn_experts=ffn,
        num_constant_experts=constant,
        num_copy_experts=copy,
        num_zero_experts=zero,
        **(defaults | fields),
    )


def check(case: Case, device: torch.device) -> None:
    [expected] = expect(case)
    assert_agrees(case, run_layer(case, device=device), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [pytest.param(n, marks=[pytest.mark.slow] if n > 2 else []) for n in range(10)])
def test_random_configurations_agree_with_the_oracle(dtype, block, device):
    for seed in range(block * 30, block * 30 + 30):
        check(draw_case(seed, dtype), device)


FULL = {"ffn": 4, "constant": 2, "copy": 1, "zero": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "linear router": {"router": "linear"},
    "mlp router": {"router": "mlp"},
    "no gating residual": {"gating_residual": False},
    "zero masked": {"gate_normalization": "zero_masked"},
    "no normalisation": {"gate_normalization": "none"},
    "top-k softmax": {"gate_normalization": "topk_softmax"},
    "logits norm": {"logits_norm_std": 1.0},
    "logits norm below one": {"logits_norm_std": 0.3, "router": "mlp"},
    "scaled input": {"scale_input_by_top_k": True},
    "k = 1": {"top_k": 1},
    "k = 1, no normalisation": {"top_k": 1, "gate_normalization": "none"},
    "k = 3": {"top_k": 3, "scale_input_by_top_k": True},
    "k = N": {"top_k": 8},
    "k = N, top-k softmax, dropless": {"top_k": 8, "gate_normalization": "topk_softmax", "capacity_factor": None},
    "dropless": {"capacity_factor": None},
    "tight capacity by weight": {"capacity_factor": 0.5, "drop_policy": "weight"},
    "tight capacity by position": {"capacity_factor": 0.5, "drop_policy": "position"},
    "tau small": {"tau": 0.1, "capacity_factor": 1.0},
    "tau one": {"tau": 1.0, "capacity_factor": 1.0},
    "tau above one": {"tau": 2.5, "capacity_factor": 0.7},
    "switch scale": {"balance_loss_switch_scale": True},
    "no auxiliary loss": {"balance_loss_weight": 0.0, "z_loss_weight": 0.0},
    "no experts of a kind: FFN": {"ffn": 0},
    "no experts of a kind: constant": {"constant": 0},
    "no experts of a kind: copy": {"copy": 0},
    "no experts of a kind: zero": {"zero": 0},
    "only FFN (vanilla MoE)": {"constant": 0, "copy": 0, "zero": 0},
    "only constant": {"ffn": 0, "constant": 3, "copy": 0, "zero": 0},
    "only copy": {"ffn": 0, "constant": 0, "copy": 3, "zero": 0},
    "only zero": {"ffn": 0, "constant": 0, "copy": 0, "zero": 3},
    "one FFN expert alone": {"ffn": 1, "constant": 0, "copy": 0, "zero": 0, "top_k": 1},
    "several of every kind": {"ffn": 3, "constant": 3, "copy": 3, "zero": 3, "top_k": 4},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_every_option_agrees_with_the_oracle(variant, dtype, tokens, device):
    check(Case(config(**(FULL | variant)), tokens=(tokens,), dtype=dtype, seed=3), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_prev", [True, False])
def test_gating_residual_carries_gradients_to_the_previous_logits(dtype, with_prev, device):
    case = Case(config(**FULL), dtype=dtype, with_prev=with_prev)
    observed = run_layer(case, device=device)
    assert_agrees(case, observed, expect(case)[0])
    gate_map = observed.grads["router.gate_map.weight"]
    assert gate_map is not None
    if with_prev:
        assert observed.grads["prev"] is not None and (observed.grads["prev"] != 0).all()
    else:
        assert (gate_map == 0).all(), "without previous logits the residual is 0 and so is the gradient of its map"


# Experts of FULL: FFN 0..3, constant 4 and 5, copy 6, zero 7. With several zero experts: 7, 8, 9.
T = 8
ROUTINGS: dict[str, tuple[tuple[int, ...], ...]] = {
    "an expert without tokens": tuple((t % 3, 4 + t % 4) for t in range(T)),
    "all tokens on one FFN expert and one copy": ((2, 6),) * T,
    "all tokens on two FFN experts": ((1, 3),) * T,
    "all tokens on zero-computation experts": tuple((4 + t % 4, 4 + (t + 1) % 4) for t in range(T)),
    "all tokens on constant experts": ((4, 5),) * T,
    "zero expert first": tuple((7, t % 7) for t in range(T)),
    "zero expert second": tuple((t % 7, 7) for t in range(T)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalization", ["zero_masked", "none", "topk_softmax"])
@pytest.mark.parametrize("capacity", [None, 0.9])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_forced_routings_agree_with_the_oracle(routing, capacity, normalization, dtype, device):
    cfg = config(**FULL, gate_normalization=normalization, capacity_factor=capacity)
    check(Case(cfg, tokens=(T,), hidden_size=9, dtype=dtype, choices=(routing,), seed=1), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalization", ["zero_masked", "none", "topk_softmax"])
def test_tokens_that_choose_only_zero_experts_give_zeros_and_no_nan(normalization, dtype, device):
    cfg = config(4, 2, 1, 3, gate_normalization=normalization, capacity_factor=None, top_k=2)
    routing = ((7, 8), (0, 7), (9, 7), (8, 6), (9, 8), (4, 5))
    case = Case(cfg, tokens=(6,), hidden_size=11, dtype=dtype, choices=(routing,), seed=4)
    observed = run_layer(case, device=device)
    assert_agrees(case, observed, expect(case)[0])
    all_zero = torch.tensor([True, False, True, False, True, False])
    assert (observed.hidden[all_zero] == 0).all() and (observed.hidden[~all_zero] != 0).any(dim=1).all()
    assert all(grad is not None and grad.isfinite().all() for grad in observed.grads.values())


@pytest.mark.parametrize("training", [True, False])
def test_selection_share_from_outside_replaces_the_counted_one(training, device):
    cfg = config(**FULL, balance_loss_scope="global_batch")
    case = Case(cfg, training=training, seed=5)
    share = torch.linspace(0.1, 0.4, 8, dtype=torch.float64)
    [expected] = expect(case, selection_share=share.tolist())
    assert_agrees(case, run_layer(case, selection_share=share, device=device), expected)
    assert expected.reference.stats["balance_loss"] != expect(case)[0].reference.stats["balance_loss"]

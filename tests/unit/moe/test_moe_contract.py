"""What users of the MoE layer rely on, checked by hand-computed values and by gates of the released code.

On the CPU, and on the GPU where there is one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from moepp import MoEConfig, MoELayer
from moepp.errors import ConfigError
from moepp.moe.gates import compute_gates
from tests.moe_cases import Case, build_layer, make_inputs
from tests.oracle import moe_reference

GOLDEN = Path(__file__).parents[2] / "golden" / "released_gates.json"


def config(**fields: Any) -> MoEConfig:
    """4 FFN experts (0..3), 2 constant (4, 5), 1 copy (6), 1 zero (7); dropless unless told otherwise."""
    counts: dict[str, Any] = {
        "num_ffn_experts": 4,
        "num_constant_experts": 2,
        "num_copy_experts": 1,
        "num_zero_experts": 1,
    }
    return MoEConfig(**({"ffn_hidden_size": 3, "capacity_factor": None} | counts | fields))


def forced(
    cfg: MoEConfig, choices: tuple[tuple[int, ...], ...], device: torch.device, **fields: Any
) -> tuple[MoELayer, torch.Tensor]:
    """A layer and the tokens that make it choose these experts, best first."""
    case = Case(cfg, tokens=(len(choices),), hidden_size=10, choices=(choices,), with_prev=False, **fields)
    inputs = make_inputs(case)
    return build_layer(case, inputs, device=device), inputs.x[0].to(device)


@pytest.mark.parametrize("name", ["default", "published_flags"])
def test_oracle_and_layer_reproduce_gates_of_the_released_code(name, device):
    golden = json.loads(GOLDEN.read_text())[name]
    logits = torch.tensor(golden["router_logits"], dtype=torch.float64)
    n = logits.shape[1]
    cfg = config(
        num_ffn_experts=golden["num_ffn_experts"],
        logits_norm_std=golden["logits_norm_std"],
        gating_residual=False,
    )
    params = make_inputs(Case(cfg, hidden_size=n)).params | {"router.weight": torch.eye(n, dtype=torch.float64)}
    [reference] = moe_reference(cfg, params, [logits])
    gates = compute_gates(logits.float().to(device), cfg)
    for t, (ids, weights) in enumerate(zip(golden["topk_ids"], golden["topk_weights"], strict=True)):
        wanted = pytest.approx(dict(zip(ids, weights, strict=True)), abs=1e-6)
        assert reference.gates[t] == wanted
        assert dict(zip(gates.topk_ids_TK[t].tolist(), gates.weights_TK[t].tolist(), strict=True)) == wanted


def test_parameters_have_the_documented_names_shapes_and_no_others():
    layer = MoELayer(config(router="mlp"), hidden_size=5)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "router.fc1.weight": (64, 5),
        "router.fc2.weight": (8, 64),
        "router.gate_map.weight": (8, 8),
        "experts.gate_up_proj": (4, 6, 5),
        "experts.down_proj": (4, 5, 3),
        "zero_computation.alpha_proj": (2, 2, 5),
        "zero_computation.value": (2, 5),
    }
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}, "no buffers in the checkpoint"
    bare = MoELayer(config(num_constant_experts=0, gating_residual=False), hidden_size=5)
    assert set(bare.state_dict()) == {"router.weight", "experts.gate_up_proj", "experts.down_proj"}


@pytest.mark.parametrize("scale", [False, True])
def test_zero_expert_leaves_its_partner_the_full_weight(scale, device):
    layer, x = forced(config(scale_input_by_top_k=scale), ((7, 6), (6, 7)), device)
    factor = 2 if scale else 1
    torch.testing.assert_close(layer(x).hidden, factor * x, rtol=0, atol=0)


def test_zero_expert_keeps_its_weight_under_topk_softmax_and_none(device):
    for normalization in ("topk_softmax", "none"):
        layer, x = forced(config(gate_normalization=normalization), ((6, 7),), device)
        out = layer(x)
        p = torch.softmax(out.router_logits, dim=-1)[0]
        weight = p[6] / (p[6] + p[7]) if normalization == "topk_softmax" else p[6]
        torch.testing.assert_close(out.hidden[0], weight * x[0])


def test_constant_expert_mixes_token_and_vector_by_a_softmax_of_the_token(device):
    layer, x = forced(config(top_k=1), ((5,),), device)
    a, b = (layer.zero_computation.alpha_proj[1] @ x[0]).tolist()
    alpha = math.exp(a) / (math.exp(a) + math.exp(b))
    expected = alpha * x[0] + (1 - alpha) * layer.zero_computation.value[1]
    torch.testing.assert_close(layer(x).hidden[0], expected)


# tau N_FFN + N_ZC = 0.5·4 + 4 = 6, k = 1, T = 12: an FFN expert keeps ceil(gamma·0.5·12/6) = ceil(gamma) assignments, a
# zero-computation expert ceil(gamma·12/6) = ceil(2 gamma).
@pytest.mark.parametrize(("gamma", "ffn_room", "zc_room"), [(1.0, 1, 2), (1.1, 2, 3), (2.0, 2, 4), (100.0, 12, 12)])
@pytest.mark.parametrize("expert", [0, 5, 6, 7])
def test_capacities_follow_eq_8_on_routed_assignments(gamma, ffn_room, zc_room, expert, device):
    cfg = config(top_k=1, tau=0.5, capacity_factor=gamma)
    layer, x = forced(cfg, ((expert,),) * 12, device)
    stats = layer(x).stats
    room = ffn_room if expert < 4 else zc_room
    assert stats.drop_fraction.item() == pytest.approx((12 - room) / 12)
    assert stats.ffn_assignments.item() == (room if expert < 4 else 0)
    assert stats.load_E.tolist() == [12.0 if e == expert else 0.0 for e in range(8)], "load counts before drops"


def test_capacity_counts_the_k_choices_of_a_token(device):
    # tau N_FFN + N_ZC = 6, k = 2, T = 12: 0.5·24/6 = 2 assignments for the FFN expert, 24/6 = 4 for the copy expert.
    layer, x = forced(config(tau=0.5, capacity_factor=1.0), ((1, 6),) * 12, device)
    stats = layer(x).stats
    assert (stats.ffn_assignments.item(), stats.ffn_per_token.item()) == (2, pytest.approx(2 / 12))
    assert stats.drop_fraction.item() == pytest.approx((10 + 8) / 24)


@pytest.mark.parametrize("expert", [0, 1])
def test_whole_capacity_is_not_rounded_up(expert, device):
    # 1.1·100/2 is 55.00000000000001 in floating point and 55 in arithmetic.
    cfg = config(num_ffn_experts=1, num_constant_experts=0, num_copy_experts=0, top_k=1, tau=1.0, capacity_factor=1.1)
    layer, x = forced(cfg, ((expert,),) * 100, device)
    assert layer(x).stats.drop_fraction.item() == pytest.approx(45 / 100)


def test_position_policy_keeps_the_earliest_tokens(device):
    layer, x = forced(config(top_k=1, tau=0.5, capacity_factor=1.5, drop_policy="position"), ((6,),) * 12, device)
    hidden = layer(x).hidden
    assert torch.equal(hidden[:3], x[:3]) and (hidden[3:] == 0).all()


def test_weight_policy_keeps_the_highest_gates_and_does_not_renormalise(device):
    cfg = config(top_k=1, tau=0.5, capacity_factor=1.5, gate_normalization="none")
    layer, x = forced(cfg, ((6,),) * 12, device, seed=2)
    out = layer(x)
    weights = torch.softmax(out.router_logits, dim=-1)[:, 6]
    kept = torch.zeros(12, dtype=torch.bool, device=device)
    kept[weights.topk(3).indices] = True
    assert not kept[:3].all(), "the case must tell the policies apart"
    torch.testing.assert_close(out.hidden, torch.where(kept, weights, 0.0)[:, None] * x)


def test_weight_policy_breaks_ties_by_the_earlier_token(device):
    layer, x = forced(config(top_k=1, tau=0.5, capacity_factor=1.5), ((6,),) * 12, device)  # every weight is exactly 1
    hidden = layer(x).hidden
    assert torch.equal(hidden[:3], x[:3]) and (hidden[3:] == 0).all()


def test_evaluation_is_dropless(device):
    layer, x = forced(config(tau=0.5, capacity_factor=0.1), tuple((t % 4, 6) for t in range(12)), device)
    trained, evaluated = layer(x), layer.eval()(x)
    assert trained.stats.drop_fraction > 0.5 and evaluated.stats.drop_fraction == 0
    alone = torch.cat([layer(x[t : t + 1]).hidden for t in range(12)])
    torch.testing.assert_close(evaluated.hidden, alone)


def test_shares_split_the_choices_by_kind_and_sum_to_one(device):
    layer, x = forced(config(capacity_factor=0.1), ((0, 1), (2, 4), (5, 6), (7, 3)), device)
    stats = layer(x).stats
    shares = [stats.share_ffn, stats.share_constant, stats.share_copy, stats.share_zero]
    assert [share.item() for share in shares] == [4 / 8, 2 / 8, 1 / 8, 1 / 8]
    assert stats.num_tokens.item() == 4 and stats.remote_assignments.item() == 0


def test_balance_loss_is_eq_7_without_a_factor_n(device):
    layer, x = forced(config(tau=0.25, balance_loss_weight=2.0), ((0, 6), (1, 6), (0, 4)), device)
    out = layer(x)
    p = torch.softmax(out.router_logits, dim=-1).mean(dim=0).tolist()
    by_hand = 2 / 3 * p[0] + 1 / 3 * p[1] + 0.25 * (1 / 3 * p[4] + 2 / 3 * p[6])
    assert out.stats.balance_loss.item() == pytest.approx(by_hand, rel=1e-6)
    assert out.aux_loss.item() == pytest.approx(2 * by_hand, rel=1e-6)


def test_batched_input_keeps_its_shape_and_gives_the_flattened_result(device):
    torch.manual_seed(0)
    layer = MoELayer(config(router="mlp"), hidden_size=6).to(device)
    x_BSD, prev_TN = torch.randn(3, 5, 6, device=device), torch.randn(15, 8, device=device)
    batched, flat = layer(x_BSD, prev_TN), layer(x_BSD.flatten(0, 1), prev_TN)
    assert batched.hidden.shape == (3, 5, 6) and batched.router_logits.shape == (15, 8)
    assert torch.equal(batched.hidden.flatten(0, 1), flat.hidden)
    assert torch.equal(batched.router_logits, flat.router_logits)
    turned = x_BSD.transpose(0, 1)  # not contiguous
    assert torch.equal(layer(turned).hidden, layer(turned.contiguous()).hidden)
    assert layer(torch.randn(0, 5, 6, device=device)).hidden.shape == (0, 5, 6)


@pytest.mark.parametrize("scale", [False, True])
def test_input_and_previous_logits_are_left_as_they_were(scale, device):
    layer = MoELayer(config(scale_input_by_top_k=scale), hidden_size=6).to(device)
    x, prev = torch.randn(7, 6, device=device), torch.randn(7, 8, device=device)
    copies = x.clone(), prev.clone()
    layer(x, prev).hidden.sum().backward()
    assert torch.equal(x, copies[0]) and torch.equal(prev, copies[1])


def test_router_stays_in_fp32_under_autocast_and_in_bf16(device):
    torch.manual_seed(1)
    layer = MoELayer(config(router="mlp"), hidden_size=32).to(device)
    x, prev = torch.randn(9, 32).to(device), torch.randn(9, 8).to(device)
    exact = layer(x, prev)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = layer(x, prev)
    assert torch.equal(cast.router_logits, exact.router_logits)
    assert cast.aux_loss.dtype == torch.float32 and torch.equal(cast.aux_loss, exact.aux_loss)
    torch.testing.assert_close(cast.hidden.float(), exact.hidden, rtol=0.05, atol=1e-3)

    low = layer.bfloat16()
    rounded = MoELayer(config(router="mlp"), hidden_size=32).to(device)
    rounded.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    out, wanted = low(x.bfloat16(), prev), rounded(x.bfloat16().float(), prev)
    assert out.hidden.dtype == torch.bfloat16 and out.router_logits.dtype == torch.float32
    torch.testing.assert_close(out.router_logits, wanted.router_logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.hidden.float(), wanted.hidden, rtol=0.05, atol=1e-3)
    (out.hidden.float().square().sum() + out.aux_loss).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in low.parameters())


def test_backward_under_autocast_gives_finite_gradients_of_every_parameter(device):
    torch.manual_seed(2)
    layer = MoELayer(config(), hidden_size=16).to(device)
    x, prev, weights = (torch.randn(20, width).to(device) for width in (16, 8, 16))
    x.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = layer(x, prev)
        loss = (out.hidden.float() * weights).sum() + out.aux_loss
    loss.backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype == torch.float32 and (parameter.grad != 0).any(), name


def test_extreme_logits_give_finite_outputs_and_gradients(device):
    # The zero expert wins by so much that every other probability underflows to 0 in fp32.
    layer, x = forced(config(), ((7, 0), (7, 6), (0, 7)), device)
    layer = layer.float()
    x = (300 * x).float().requires_grad_()
    out = layer(x)
    (out.hidden.sum() + out.aux_loss).backward()
    assert out.hidden.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_recomputed_forward_gives_the_same_result_and_gradients(device):
    torch.manual_seed(3)
    layer = MoELayer(config(capacity_factor=0.7), hidden_size=6).to(device)
    x, weights = torch.randn(11, 6).to(device), torch.randn(11, 6).to(device)
    grads = []
    for recompute in (False, True):
        layer.zero_grad()
        run = checkpoint if recompute else lambda f, x, **_: f(x)
        hidden, aux = run(lambda x: (lambda o: (o.hidden, o.aux_loss))(layer(x)), x, use_reentrant=False)
        ((hidden * weights).sum() + aux).backward()
        grads.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("shape", [(7, 5), (7, 7), (2, 3, 5), (6,), (2, 2, 3, 6)])
def test_input_of_the_wrong_shape_is_refused_with_a_clear_message(shape):
    layer = MoELayer(config(), hidden_size=6)
    with pytest.raises(ConfigError) as error:
        layer(torch.randn(shape))
    message = str(error.value)
    assert str(list(shape)) in message and "hidden_size=6" in message and "\n" not in message


@pytest.mark.parametrize("shape", [(7, 7), (6, 8), (7, 8, 1)])
def test_previous_logits_of_the_wrong_shape_are_refused_with_a_clear_message(shape):
    layer = MoELayer(config(), hidden_size=6)
    with pytest.raises(ConfigError) as error:
        layer(torch.randn(7, 6), torch.randn(shape))
    assert str(list(shape)) in str(error.value) and "[7, 8]" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_a_hook_keeps_of_the_zero_computation_experts_stays_as_it_was(everywhere, device):
    layer, x = forced(config(), ((0, 6), (4, 1), (6, 7), (2, 3)), device)
    layer, x = layer.float(), x.float()
    wanted = layer.zero_computation(x, *gates_of(layer, x)).clone()
    kept = []

    def keep(module: torch.nn.Module, inputs: object, output: object) -> None:
        if module is layer.zero_computation:
            kept.append(output)

    register = register_module_forward_hook if everywhere else layer.zero_computation.register_forward_hook
    hook = register(keep)
    try:
        with torch.no_grad():
            hidden = layer(x).hidden
    finally:
        hook.remove()
    torch.testing.assert_close(kept[0], wanted, rtol=0, atol=0)
    torch.testing.assert_close(layer(x).hidden, hidden, rtol=0, atol=0)


def gates_of(layer: MoELayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen experts and their gate weights, [T, K] each."""
    gates = layer.router.choose(layer.router(x, None))
    return gates.topk_ids_TK, gates.weights_TK

"""Registered parts that return or do what they must not: named, whatever the precision, before memory is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moepp import MoEConfig, MoELayer
from moepp.errors import ConfigError
from moepp.moe.experts import ExpertKind
from moepp.moe.gates import compute_gates
from moepp.moe.router import LinearRouter
from moepp.registry import BALANCE_RULES, EXPERT_KINDS, GATE_NORMALIZATIONS, ROUTERS


def small(**moe) -> MoEConfig:
    return MoEConfig(num_ffn_experts=2, ffn_hidden_size=4, num_copy_experts=1, num_zero_experts=1, **moe)


@EXPERT_KINDS.register("odd_kind")
class OddKind(ExpertKind):
    """Returns ``answer(x_TD, gates_TZ)``."""

    seen: Tensor
    answer: ClassVar[Callable] = lambda self, x_TD, gates_TZ: x_TD

    def __init__(self, num_experts, hidden_size):
        super().__init__(num_experts, hidden_size)
        self.register_buffer("seen", torch.zeros(1))

    def reset_buffers(self):
        self.seen.zero_()

    def forward(self, x_TD, gates_TZ):
        return self.answer(x_TD, gates_TZ)


@ROUTERS.register("odd_router")
class OddRouter(LinearRouter):
    """Passes what it makes through ``change_logits`` and ``change_gates``."""

    seen: Tensor
    change_logits: ClassVar[Callable] = lambda self, logits_TE: logits_TE
    change_gates: ClassVar[Callable] = lambda self, gates: gates

    def make_parameters(self, hidden_size):
        super().make_parameters(hidden_size)
        self.register_buffer("seen", torch.zeros(1))

    def reset_buffers(self):
        self.seen.zero_()

    def project(self, x_TD):
        return self.change_logits(super().project(x_TD))

    def choose(self, logits_TE):
        return self.change_gates(super().choose(logits_TE))


class LateRouter(LinearRouter):
    """Makes the logits in its own forward."""

    def forward(self, x_TD, prev_logits_TE):
        return super().forward(x_TD, prev_logits_TE).to(torch.bfloat16)


ROUTERS.register("late_router")(LateRouter)
GATE_NORMALIZATIONS.register("odd_gates")(lambda logits_TE, cfg: OddGates.change(compute_gates(logits_TE, PLAIN)))
BALANCE_RULES.register("odd_rule")(lambda *, probs_TE, selection_share_E, cfg: OddRule.change(probs_TE.sum()))


class OddGates:
    change: ClassVar[Callable] = lambda gates: gates


class OddRule:
    change: ClassVar[Callable] = lambda loss: loss


KIND, ROUTER = {"extra_experts": {"odd_kind": 1}}, {"router": "odd_router"}
GATES, RULE = {"gate_normalization": "odd_gates"}, {"balance_rule": "odd_rule"}
PLAIN = small()
PLACES = {"answer": OddKind, "change_logits": OddRouter, "change_gates": OddRouter, "gates": OddGates, "rule": OddRule}


def replace_part(monkeypatch, place: str, function: Callable) -> None:
    owner = PLACES[place]
    is_method = owner in (OddKind, OddRouter)
    monkeypatch.setattr(owner, place if is_method else "change", function if is_method else staticmethod(function))


def odd(**fields: Callable) -> Callable:
    return lambda gates: dataclasses.replace(
        gates, **{name: change(getattr(gates, name)) for name, change in fields.items()}
    )


def method(function: Callable) -> Callable:
    return lambda self, *arguments: function(*arguments)


WRONG_DTYPES = {
    "kind in fp32": (KIND, "answer", method(lambda x, gates: -gates.sum(1, keepdim=True) * x), "expert kind odd_kind"),
    "logits in bf16": (ROUTER, "change_logits", method(Tensor.bfloat16), "router odd_router"),
    "logits in fp64": (ROUTER, "change_logits", method(Tensor.double), "router odd_router"),
    "logits in bf16 of its own forward": ({"router": "late_router"}, "", None, "router late_router"),
    "ids in int32": (GATES, "gates", odd(topk_ids_TK=Tensor.int), "topk_ids_TK of gate normalisation odd_gates"),
    "weights in bf16": (GATES, "gates", odd(weights_TK=Tensor.bfloat16), "weights_TK of gate normalisation odd_gates"),
    "weights in fp64": (GATES, "gates", odd(weights_TK=Tensor.double), "weights_TK of gate normalisation odd_gates"),
    "scores in bf16": (GATES, "gates", odd(probs_TE=Tensor.bfloat16), "probs_TE of gate normalisation odd_gates"),
    "ids of its own in int32": (
        ROUTER,
        "change_gates",
        method(odd(topk_ids_TK=Tensor.int)),
        "topk_ids_TK of router odd_",
    ),
    "weights of its own in bf16": (
        *(ROUTER, "change_gates", method(odd(weights_TK=Tensor.bfloat16))),
        "weights_TK of router odd_router",
    ),
    "loss in fp64": (RULE, "rule", Tensor.double, "balance rule odd_rule"),
}


@pytest.mark.parametrize("normalization", ["zero_masked", "none"])
@pytest.mark.parametrize("case", WRONG_DTYPES)
def test_part_that_returns_another_dtype_is_named_in_bfloat16(case, normalization, monkeypatch):
    moe, place, function, expected = WRONG_DTYPES[case]
    if place:
        replace_part(monkeypatch, place, function)
    layer = MoELayer(small(**{"gate_normalization": normalization, **moe}), hidden_size=64).bfloat16()
    with pytest.raises(ConfigError) as error:
        layer(torch.randn(32, 64, dtype=torch.bfloat16), torch.zeros(32, layer.cfg.num_experts))
    assert str(error.value).startswith(f"{expected}") and "returned torch." in str(error.value)
    assert "; return torch." in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("moe", [KIND, ROUTER, GATES, RULE], ids=lambda moe: next(iter(moe)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_part_that_keeps_to_the_dtypes_is_taken_in_every_precision(dtype, moe, monkeypatch):
    replace_part(monkeypatch, "answer", method(lambda x, gates: gates.sum(1, keepdim=True).to(x.dtype) * x))
    layer = MoELayer(small(**moe), hidden_size=64).to(dtype)
    out = layer(torch.randn(32, 64, dtype=dtype))
    (out.hidden.float().square().sum() + out.aux_loss).backward()
    assert out.hidden.dtype == dtype and all(
        p.grad is not None and p.grad.isfinite().all() for p in layer.experts.parameters()
    )


@pytest.mark.parametrize(("moe", "place"), [(GATES, "gates"), (ROUTER, "change_gates")])
@pytest.mark.parametrize(("shift", "named"), [(-4, r"-\d"), (3, r"\d"), (2**40, r"\d{13}")])
def test_expert_that_does_not_exist_is_named(moe, place, shift, named, monkeypatch):
    change = odd(topk_ids_TK=lambda ids_TK: ids_TK + shift)
    replace_part(monkeypatch, place, change if place == "gates" else method(change))
    with pytest.raises(ConfigError, match=rf"topk_ids_TK of .* holds {named}; return numbers of experts, 0 to 3"):
        MoELayer(small(**moe), hidden_size=8)(torch.randn(30, 8))


def test_choices_that_are_a_column_of_a_wider_tensor_give_the_same_layer(monkeypatch):
    layer, x = MoELayer(small(top_k=1, **ROUTER), hidden_size=8).eval(), torch.randn(30, 8)
    wanted = layer(x).hidden
    widen = lambda value: torch.stack((value, torch.full_like(value, 3)), dim=2)[..., 0]  # noqa: E731
    replace_part(monkeypatch, "change_gates", method(odd(topk_ids_TK=widen, weights_TK=widen)))
    assert torch.equal(layer(x).hidden, wanted)


def draw(value):
    return value + torch.rand(())


DRAWS = {
    "kind": (KIND, "answer", method(lambda x, gates: F.dropout(x)), "expert kind odd_kind"),
    "noisy logits": (ROUTER, "change_logits", method(draw), "router odd_router"),
    "noisy choice": (ROUTER, "change_gates", method(odd(weights_TK=draw)), "router odd_router"),
    "normalisation": (GATES, "gates", odd(weights_TK=draw), "gate normalisation odd_gates"),
    "balance rule": (RULE, "rule", draw, "balance rule odd_rule"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", DRAWS)
def test_part_that_draws_random_numbers_is_named(case, training, monkeypatch):
    moe, place, function, expected = DRAWS[case]
    replace_part(monkeypatch, place, function)
    with pytest.raises(ConfigError) as error:
        MoELayer(small(**moe), hidden_size=8).train(training)(torch.randn(30, 8))
    assert str(error.value).startswith(f"{expected} drew random numbers") and "\n" not in str(error.value)


def count_in_place(self, value, *_):
    self.seen += 1
    return value


def count_anew(self, value, *_):
    self.seen = self.seen + 1
    return value


@pytest.mark.parametrize("count", [count_in_place, count_anew])
@pytest.mark.parametrize(
    ("moe", "place"), [(KIND, "answer"), (ROUTER, "change_logits"), (ROUTER, "change_gates")], ids=str
)
def test_part_that_changes_a_buffer_while_it_computes_is_named(moe, place, count, monkeypatch):
    replace_part(monkeypatch, place, count)
    layer, x = MoELayer(small(**moe), hidden_size=8), torch.randn(30, 8)
    with pytest.raises(ConfigError, match=r"odd_\w+ changed its buffer seen .*; change it in after_optimizer_step"):
        layer(x)
    with torch.inference_mode(), pytest.raises(ConfigError, match="changed its buffer seen"):
        layer(x)


def test_previous_logits_of_a_wider_dtype_are_refused_and_of_a_narrower_one_are_taken():
    layer, x = MoELayer(small(), hidden_size=8), torch.randn(30, 8)
    with pytest.raises(ConfigError, match=r"prev_logits_TE is torch.float64, and logits of torch.float32 tokens are"):
        layer(x, torch.zeros(30, 4, dtype=torch.float64))
    assert layer(x, torch.zeros(30, 4, dtype=torch.bfloat16)).router_logits.dtype == torch.float32

"""State of routers and expert kinds survives every way to copy a layer: deepcopy, state_dict, a file, a precision."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import docs.examples.bias_router
import docs.examples.scale_expert  # noqa: F401
from moepp import MoEConfig, MoELayer
from moepp.moe.experts import ExpertKind
from moepp.registry import EXPERT_KINDS

WIDTH, TOKENS = 12, 40
CPU = torch.device("cpu")


class Masked(ExpertKind):
    """E(x) = x where the mask is set, shifted elsewhere; state of two types that are not the model's."""

    mask: Tensor
    shift: Tensor

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__(num_experts, hidden_size)
        self.register_buffer("mask", torch.empty(hidden_size, dtype=torch.bool))
        self.register_buffer("shift", torch.empty(hidden_size, dtype=torch.float64))
        if self.mask.device.type != "meta":
            self.reset_buffers()

    def reset_buffers(self) -> None:
        self.mask.zero_()
        self.shift.zero_()

    def forward(self, x_TD: Tensor, gates_TZ: Tensor) -> Tensor:
        return gates_TZ.sum(1, keepdim=True).to(x_TD.dtype) * torch.where(self.mask, x_TD, x_TD + self.shift.to(x_TD))


@pytest.fixture(autouse=True)
def masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind is known for one test."""
    monkeypatch.setattr(EXPERT_KINDS, "_entries", EXPERT_KINDS._entries | {"masked": Masked})


def make_layer() -> MoELayer:
    """A fresh layer: its state is the first one."""
    cfg = MoEConfig(
        num_ffn_experts=4,
        ffn_hidden_size=8,
        top_k=3,
        capacity_factor=None,
        router="bias",
        router_options={"bias_update_rate": 0.125},
        gate_normalization="none",
        extra_experts={"scale": 2, "masked": 1},
    )
    torch.manual_seed(0)
    return MoELayer(cfg, WIDTH)


def states(layer: MoELayer) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return layer.state_dict()


def make_used_layer() -> MoELayer:
    """A layer whose parameters and buffers all have values that no fresh one has."""
    layer = make_layer()
    with torch.no_grad():
        for number, value in enumerate(layer.state_dict().values()):
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)) * 0.5)
            else:
                value.copy_(torch.arange(value.numel()).view(value.shape) % 3 == 0)
    layer.router.after_optimizer_step(torch.arange(7.0))
    return layer


def run(layer: MoELayer) -> list[Tensor]:
    """Output and all gradients."""
    x_TD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(7)).requires_grad_()
    copied = copy.deepcopy(layer).float()
    out = copied(x_TD)
    (out.hidden.square().sum() + out.aux_loss).backward()
    grads = [parameter.grad for parameter in copied.parameters() if parameter.grad is not None]
    assert x_TD.grad is not None
    return [out.hidden.detach(), out.router_logits.detach(), x_TD.grad, *grads]


def through_a_file(layer: MoELayer) -> MoELayer:
    stream, other = io.BytesIO(), make_layer()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    return other


def through_memory_without_values(layer: MoELayer) -> MoELayer:
    """As engines and exports build models: on the meta device, then in memory, then filled."""
    with torch.device("meta"):
        other = make_layer()
    other.to_empty(device=CPU)
    other.load_state_dict(layer.state_dict())
    return other


def through_assignment(layer: MoELayer) -> MoELayer:
    with torch.device("meta"):
        other = make_layer()
    other.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=True)
    return other


COPIES: dict[str, Callable[[MoELayer], MoELayer]] = {
    "deepcopy": copy.deepcopy,
    "file": through_a_file,
    "memory without values": through_memory_without_values,
    "assignment": through_assignment,
}


@pytest.mark.parametrize("way", COPIES)
def test_copy_has_all_state_and_computes_the_same(way: str) -> None:
    layer = make_used_layer()
    before = {name: value.clone() for name, value in states(layer).items()}
    assert {"router.bias", "zero_computation.masked.mask", "zero_computation.masked.shift"} <= before.keys()
    other = COPIES[way](layer)
    assert states(other).keys() == before.keys()
    for name, value in states(other).items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    for one, two in zip(run(layer), run(other), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(run(make_layer())[0], run(layer)[0])


@pytest.mark.parametrize("way", COPIES)
def test_copy_shares_no_state(way: str) -> None:
    layer = make_used_layer()
    before = {name: value.clone() for name, value in states(layer).items()}
    other = COPIES[way](layer)
    other.router.after_optimizer_step(torch.arange(7.0).flip(0))
    with torch.no_grad():
        for value in other.state_dict().values():
            value.zero_()
    for name, value in states(layer).items():
        assert torch.equal(value, before[name]), name


def test_state_keeps_its_precision_when_the_weights_change_theirs() -> None:
    layer = make_used_layer()
    buffers = {name: value.clone() for name, value in layer.named_buffers()}
    for change in (torch.bfloat16, torch.float64, torch.float32):
        layer.to(change)
        assert layer.experts.down_proj.dtype == change
        for name, value in layer.named_buffers():
            assert value.dtype == buffers[name].dtype and torch.equal(value, buffers[name]), name


def test_state_that_is_missing_or_unknown_is_not_loaded_without_a_word() -> None:
    whole = make_used_layer().state_dict()
    without = {name: value for name, value in whole.items() if name != "router.bias"}
    for broken in (without, whole | {"router.other": torch.zeros(1)}):
        with pytest.raises(RuntimeError, match=r"router\.(bias|other)"):
            make_layer().load_state_dict(broken)

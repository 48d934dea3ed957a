"""Initial weights depend on seed, name and logical shape alone."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from moepp.config import ModelConfig, MoEConfig
from moepp.errors import ConfigError
from moepp.model import Transformer, init_parameters
from moepp.moe.experts import ExpertKind
from moepp.moe.router import LinearRouter
from moepp.registry import EXPERT_KINDS, ROUTERS

CFG = ModelConfig(
    vocab_size=300,
    hidden_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=32,
    init_std=0.05,
    moe_layer_interval=2,
    dense_ffn_hidden_size=40,
    moe=MoEConfig(
        num_ffn_experts=8,
        ffn_hidden_size=24,
        num_zero_experts=1,
        num_copy_experts=1,
        num_constant_experts=2,
        router="mlp",
    ),
)


def initialised(cfg: ModelConfig = CFG, seed: int = 7, **layout: int) -> dict[str, torch.Tensor]:
    model = Transformer(cfg)
    init_parameters(model, seed, **layout)
    return dict(model.named_parameters())


def sharded(ep_rank: int, ep_size: int) -> Transformer:
    """The model of one rank, without a process group: its expert weights cut to the local number."""
    model = Transformer(CFG)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = parameter.data[: 8 // ep_size].clone()
    init_parameters(model, 7, ep_rank, ep_size)
    return model


def fingerprint() -> str:
    digest = hashlib.sha256()
    for value in initialised().values():
        digest.update(value.detach().numpy().tobytes())
    return digest.hexdigest()


def test_every_kind_has_its_distribution():
    for name, value in initialised().items():
        if name.endswith("norm.weight"):
            assert torch.equal(value, torch.ones_like(value)), name
            continue
        std = 1.0 if name.endswith("zero_computation.value") else 0.05
        margin = 5 / math.sqrt(value.numel())  # five standard errors
        assert abs(value.mean().item()) < std * margin, name
        assert abs(value.std().item() / std - 1) < margin, name


def test_constant_vectors_start_at_the_size_asked_for_and_nothing_else_changes():
    usual, small = initialised(), initialised(dataclasses.replace(CFG, constant_init_std=0.25))
    for name, value in small.items():
        factor = 0.25 if name.endswith("zero_computation.value") else 1.0
        torch.testing.assert_close(value, factor * usual[name])


class Named(nn.Module):
    """Modules that are called as the model's own are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shared_experts = nn.ParameterDict(
            {"gate_up_proj": torch.empty(60, width), "down_proj": torch.empty(3, 60)}
        )
        self.norm, self.input_layernorm = nn.RMSNorm(3000), nn.LayerNorm(3000, bias=False)
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(width, 60, bias=False)})
        self.zero_computation = nn.ParameterDict({"value": torch.empty(60, width)})


def test_names_inside_a_registered_part_draw_like_any_other(monkeypatch):
    class NamedKind(ExpertKind):
        def __init__(self, num_experts: int, hidden_size: int) -> None:
            super().__init__(num_experts, hidden_size)
            self.named, self.plain_norm = Named(hidden_size), nn.RMSNorm(8)

        def init(self, name: str) -> float | None:
            return 1.0 if name == "plain_norm.weight" else None

    class NamedRouter(LinearRouter):
        def make_parameters(self, hidden_size: int) -> None:
            super().make_parameters(hidden_size)
            self.named = Named(hidden_size)

    for registry, name, part in ((EXPERT_KINDS, "zero_computation", NamedKind), (ROUTERS, "named", NamedRouter)):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        registry.register(name)(part)
    moe = dataclasses.replace(CFG.moe, router="named", extra_experts={"zero_computation": 2})
    values = initialised(dataclasses.replace(CFG, moe=moe))
    inside = {name: value for name, value in values.items() if ".named." in name}
    assert len(inside) == 2 * 6
    for name, value in inside.items():
        assert abs(value.std().item() / 0.05 - 1) < 5 / math.sqrt(value.numel()), name
    assert torch.equal(values["layers.1.moe.zero_computation.zero_computation.plain_norm.weight"], torch.ones(8))
    usual = initialised()
    assert all(torch.equal(values[name], value) for name, value in usual.items() if ".router." not in name)


def test_no_two_parameters_and_no_two_experts_share_their_numbers():
    seen: dict[float, str] = {}
    for name, value in initialised().items():
        if name.endswith("norm.weight"):
            continue
        rows = value if ".experts." in name else value.unsqueeze(0)
        for i, row in enumerate(rows):
            first = float(row.detach().flatten()[0] / (1.0 if name.endswith("value") else 0.05))
            key = round(first, 4)
            assert key not in seen, f"{name}[{i}] starts like {seen[key]}"
            seen[key] = f"{name}[{i}]"


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_expert_slices_are_bitwise_those_of_one_process(ep_size):
    whole = initialised()
    shards = [dict(sharded(rank, ep_size).named_parameters()) for rank in range(ep_size)]
    for name, value in whole.items():
        if ".experts." in name:
            assert torch.equal(torch.cat([shard[name] for shard in shards]), value), name
        else:
            assert all(torch.equal(shard[name], value) for shard in shards), name


def test_seed_decides_everything_and_global_random_state_nothing():
    torch.manual_seed(1)
    first = initialised(seed=7)
    torch.manual_seed(2)
    second, other = initialised(seed=7), initialised(seed=8)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.equal(value, other[name]) == name.endswith("norm.weight"), name


def test_a_parameter_keeps_its_numbers_in_a_deeper_model():
    shallow, deep = initialised(), initialised(dataclasses.replace(CFG, num_layers=6))
    assert all(torch.equal(value, deep[name]) for name, value in shallow.items())


def test_low_precision_weights_are_the_rounded_fp32_ones():
    model = Transformer(CFG).bfloat16()
    init_parameters(model, 7)
    for name, value in initialised().items():
        assert torch.equal(model.get_parameter(name), value.bfloat16()), name


def test_weights_are_the_same_in_another_process():
    code = "from tests.unit.model.test_model_init import fingerprint; print(fingerprint())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == fingerprint()


def test_meta_parameters_and_wrong_layout_are_refused():
    with torch.device("meta"):
        model = Transformer(CFG)
    with pytest.raises(ConfigError, match=r"meta device.*to_empty"):
        init_parameters(model, 7)
    with pytest.raises(ConfigError, match=r"holds 8 experts, but 8 over ep_size=2 ranks are 4 each"):
        init_parameters(Transformer(CFG), 7, ep_rank=0, ep_size=2)

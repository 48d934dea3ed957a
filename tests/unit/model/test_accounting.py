"""Parameter and FLOP formulas against the real model, torch's counter and the paper's table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moepp.config import ModelConfig, MoEConfig
from moepp.config.load import build
from moepp.errors import ConfigError
from moepp.metrics import Throughput
from moepp.model import Transformer, init_parameters
from moepp.model.accounting import (
    activated_parameters,
    balanced_ffn_per_token,
    count_parameters,
    flops_per_token,
    max_ffn_per_token,
    parts_without_flops,
)
from moepp.moe.experts import ExpertKind
from moepp.moe.router import LinearRouter
from moepp.ops import use_kernels
from moepp.registry import EXPERT_KINDS, ROUTERS, Registry

CONFIG_FOLDER = Path(__file__).parents[3] / "configs" / "model"
SHIPPED = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))

BASE = ModelConfig(
    vocab_size=97,
    hidden_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    max_seq_len=16,
    init_std=0.3,
    moe=MoEConfig(
        num_ffn_experts=4,
        ffn_hidden_size=20,
        num_zero_experts=1,
        num_copy_experts=1,
        num_constant_experts=2,
        capacity_factor=None,
    ),
)
VARIANTS = {
    "moepp": BASE,
    "gqa_tied_mlp": dataclasses.replace(
        BASE, num_kv_heads=2, tie_embeddings=True, moe=dataclasses.replace(BASE.moe, router="mlp")
    ),
    "dense_between": dataclasses.replace(BASE, moe_layer_interval=2, dense_ffn_hidden_size=36, num_layers=5),
    "vanilla": dataclasses.replace(
        BASE,
        moe=MoEConfig(num_ffn_experts=4, ffn_hidden_size=20, gating_residual=False, capacity_factor=None),
    ),
}


def load(name: str) -> ModelConfig:
    return build(ModelConfig, yaml.safe_load((CONFIG_FOLDER / f"{name}.yaml").read_text()), "model")


def on_meta(cfg: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(cfg)


def test_every_shipped_file_is_listed():
    sizes = ("0.6b", "1b", "2b", "7b")
    paper = {f"{kind}_{size}" for kind in ("moe", "moepp") for size in sizes}
    assert set(SHIPPED) == {"tiny", "tiny_vanilla"} | paper


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_builds_and_says_only_what_differs_from_the_defaults(name):
    tree = yaml.safe_load((CONFIG_FOLDER / f"{name}.yaml").read_text())
    for cls, section in ((ModelConfig, tree), (MoEConfig, tree["moe"])):
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        assert set(section) <= set(defaults)
        assert not [key for key, value in section.items() if value == defaults[key]]
    model = on_meta(load(name))
    assert count_parameters(model.cfg).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "total", "active_millions", "without_table_millions"),
    [
        ("moepp_0.6b", 582_146_496, 242.4, 192.1),
        ("moepp_1b", 1_035_208_128, 242.5, 192.2),
        ("moepp_2b", 1_941_487_104, 242.8, 192.5),
        ("moepp_7b", 7_676_619_648, 1334.8, 1234.2),
    ],
)
def test_counts_of_the_paper(name, total, active_millions, without_table_millions):
    cfg = load(name)
    assert count_parameters(cfg).total == total
    assert activated_parameters(cfg) / 1e6 == pytest.approx(active_millions, abs=0.05)
    assert activated_parameters(cfg, include_embedding=False) / 1e6 == pytest.approx(without_table_millions, abs=0.06)


@pytest.mark.parametrize("size", ["0.6b", "1b", "2b", "7b"])
def test_vanilla_differs_from_moepp_in_router_and_constant_experts_only(size):
    vanilla, moepp = count_parameters(load(f"moe_{size}")), count_parameters(load(f"moepp_{size}"))
    same = dataclasses.replace(moepp, router=vanilla.router, constant_experts=0)
    assert vanilla == same and vanilla.router < moepp.router


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_counts_by_kind_equal_the_models(cfg):
    places = {
        "embed_tokens": "embedding",
        "self_attn": "attention",
        "norm": "norms",
        "router": "router",
        "zero_computation": "constant_experts",
        "experts": "ffn_experts",
        "mlp": "dense_ffn",
        "lm_head": "lm_head",
    }
    seen = dict.fromkeys([*places.values(), "registered_experts"], 0)
    for name, parameter in on_meta(cfg).named_parameters():
        seen[next(kind for part, kind in places.items() if part in name)] += parameter.numel()
    assert dataclasses.asdict(count_parameters(cfg)) == seen


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_activated_parameters_are_those_without_the_idle_experts(cfg):
    names = dict(on_meta(cfg).named_parameters())
    idle = sum(p.numel() * 2 // 4 for n, p in names.items() if ".experts." in n)  # 2 of 4 experts
    total = sum(p.numel() for p in names.values())
    assert activated_parameters(cfg) == total - idle
    assert activated_parameters(cfg, 4.0) == total
    table = 0 if cfg.tie_embeddings else names["embed_tokens.weight"].numel()
    assert activated_parameters(cfg, include_embedding=False) == total - idle - table


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_flops_equal_torchs_counter(cfg):
    model, batch, length = Transformer(cfg), 2, 16
    init_parameters(model, 0)
    ids_BS = torch.randint(cfg.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    # Plain matrix products: the counter sees none of a compiled kernel's, and not all of the fused attention's.
    with sdpa_kernel(SDPBackend.MATH), use_kernels("torch"):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            out = model.loss(ids_BS, ids_BS)
        with FlopCounterMode(display=False) as both:
            again = model.loss(ids_BS, ids_BS)
            (again.ce_sum + again.aux_loss).backward()
    ffn_per_token = sum(float(s.ffn_per_token) for s in out.stats) / len(out.stats)
    if cfg.moe.num_zero_computation_experts:
        assert 0 < ffn_per_token < cfg.moe.top_k
    flops = flops_per_token(cfg, length, ffn_per_token)
    tokens = batch * length
    # The first MoE layer has no logits before it: its gate map is not multiplied.
    unused = tokens * 2 * cfg.moe.num_experts**2 if cfg.moe.gating_residual else 0
    assert forward.get_total_flops() == pytest.approx(tokens * flops.forward - unused, rel=1e-6)
    assert both.get_total_flops() == pytest.approx(tokens * flops.forward_backward - 3 * unused, rel=1e-6)


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    """Register parts for one test."""
    before = {registry: dict(registry._entries) for registry in (EXPERT_KINDS, ROUTERS)}

    def enter(registry: Registry, name: str, cls: type) -> None:
        registry.register(name)(cls)

    yield enter
    for registry, entries in before.items():
        registry._entries.clear()
        registry._entries.update(entries)


class Mix(ExpertKind):
    """Two products per token: with its own matrix and with the gates."""

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__(num_experts, hidden_size)
        self.weight = nn.Parameter(torch.ones(num_experts, hidden_size))
        self.turn = nn.Parameter(torch.ones(hidden_size, hidden_size))

    def forward(self, x_TD, gates_TZ):
        return (x_TD @ self.turn) * (gates_TZ.to(x_TD.dtype) @ self.weight)

    def flops_per_token(self):
        return 2.0 * self.hidden_size * (self.hidden_size + self.num_experts)


def with_mix(cls: type, register: Callable[..., None], count: int = 2) -> ModelConfig:
    register(EXPERT_KINDS, "mix", cls)
    return dataclasses.replace(BASE, moe=dataclasses.replace(BASE.moe, extra_experts={"mix": count}))


def test_flops_of_a_registered_kind_equal_torchs_counter(register):
    cfg = with_mix(Mix, register)
    plain = flops_per_token(BASE, 16, 1.0)
    found = flops_per_token(cfg, 16, 1.0)
    module = Mix(2, cfg.hidden_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.ones(7, cfg.hidden_size), torch.ones(7, 2))
    assert found.registered_experts == len(cfg.moe_layers) * counter.get_total_flops() / 7
    assert found.forward is not None and plain.forward is not None and found.router is not None and plain.router
    assert found.forward - plain.forward == found.registered_experts + found.router - plain.router
    assert parts_without_flops(cfg) == []


@pytest.mark.parametrize("how", ["not said", "said to be unknown", "forward changed", "product added to a router"])
def test_unknown_flops_are_not_guessed(register, how):
    if how == "product added to a router":

        class Bent(LinearRouter):
            def project(self, x_TD):
                return super().project(x_TD @ torch.ones(x_TD.shape[1], x_TD.shape[1]))

        register(ROUTERS, "bent", Bent)
        cfg = dataclasses.replace(BASE, moe=dataclasses.replace(BASE.moe, router="bent"))
        expected = "model.moe.router=bent"
    else:

        class Silent(Mix):
            def flops_per_token(self):
                return None

        class Changed(Mix):
            def forward(self, x_TD, gates_TZ):
                return super().forward(x_TD @ self.turn, gates_TZ)

        class Plain(ExpertKind):
            pass

        kinds = {"not said": Plain, "said to be unknown": Silent, "forward changed": Changed}
        cfg, expected = with_mix(kinds[how], register), "model.moe.extra_experts.mix"
    flops = flops_per_token(cfg, 16, 1.0)
    assert flops.forward is None and flops.forward_backward is None
    assert parts_without_flops(cfg) == [expected]
    throughput = Throughput(1, peak_flops=1e12)
    assert "throughput/mfu" not in throughput.read(flops.forward_backward)
    assert "throughput/mfu" in throughput.read(1.0)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "many", True])
def test_flops_that_are_no_number_are_refused(register, value):
    class Wrong(Mix):
        def flops_per_token(self):
            return value

    with pytest.raises(ConfigError, match=r"Wrong\.flops_per_token\(\) returned .*; return a number"):
        flops_per_token(with_mix(Wrong, register), 16, 1.0)


def test_bias_router_of_the_examples_counts_as_the_linear_one():
    import docs.examples.bias_router  # noqa: F401

    moe = dataclasses.replace(
        BASE.moe, router="bias", gate_normalization="none", logits_norm_std=None, router_options={}
    )
    linear = dataclasses.replace(moe, router="linear")
    found, expected = (flops_per_token(dataclasses.replace(BASE, moe=m), 16, 1.0) for m in (moe, linear))
    assert found == expected and found.forward is not None


def test_flops_depend_on_routing_and_length_as_documented():
    def cost(ffn_per_token: float, seq_len: int = 16) -> float:
        return flops_per_token(BASE, seq_len, ffn_per_token).forward

    one_expert = 3 * 6 * 24 * 20  # layers x 6 D F
    assert cost(2.0) - cost(1.25) == pytest.approx(0.75 * one_expert)
    assert cost(4.0) - cost(max_ffn_per_token(BASE.moe)) == pytest.approx(2 * one_expert)
    assert cost(1.0, 48) - cost(1.0, 16) == 3 * 4 * 32 * 24
    assert flops_per_token(BASE, 16, 1.0).forward_backward == 3 * cost(1.0)


def test_balanced_routing_gives_the_papers_expected_cost():
    assert balanced_ffn_per_token(load("moepp_0.6b").moe) == pytest.approx(2 * 6 / (6 + 4))
    assert balanced_ffn_per_token(load("moe_0.6b").moe) == 2.0
    assert max_ffn_per_token(dataclasses.replace(BASE.moe, num_ffn_experts=1)) == 1

"""Which parameters are sharded over experts, and which decay: every one is in exactly one group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moepp.config import ModelConfig, MoEConfig
from moepp.distributed.parameters import (
    DENSE,
    decays,
    group_parameters,
    is_expert_parameter,
    placement_of,
    split_name,
    tensor_dim,
)
from moepp.metrics.norms import MODULES, ModuleNorms
from moepp.model import Transformer


def make_model(**changes: object) -> Transformer:
    moe = MoEConfig(
        num_ffn_experts=4, ffn_hidden_size=6, num_zero_experts=1, num_copy_experts=1, num_constant_experts=2
    )
    shapes = {"vocab_size": 11, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "max_seq_len": 8}
    with torch.device("meta"):
        return Transformer(ModelConfig(moe=moe, **(shapes | changes)))  # type: ignore[arg-type]


def test_groups_hold_every_parameter_once():
    model = make_model(moe_layer_interval=2, dense_ffn_hidden_size=12)
    groups = group_parameters(model.named_parameters())
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert sum(p.numel() for g in groups for p in g.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        for name, parameter in group.parameters.items():
            assert parameter is model.get_parameter(name)
            assert group.placement.kind == ("expert" if is_expert_parameter(name) else "dense")
            assert group.decay == decays(name, parameter)


def test_only_norms_and_constant_vectors_are_not_decayed():
    model = make_model()
    spared = {name for name, parameter in model.named_parameters() if not decays(name, parameter)}
    assert spared == {
        "norm.weight",
        *(f"layers.{i}.{norm}.weight" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")),
        *(f"layers.{i}.moe.zero_computation.value" for i in (0, 1)),
    }


def test_only_ffn_experts_of_moe_layers_are_sharded():
    sharded = {name for name, _ in make_model().named_parameters() if is_expert_parameter(name)}
    assert sharded == {f"layers.{i}.moe.experts.{p}" for i in (0, 1) for p in ("gate_up_proj", "down_proj")}


def test_tensor_parallelism_cuts_the_heads_of_attention_alone():
    names = [name for name, _ in make_model(moe_layer_interval=2, dense_ffn_hidden_size=12).named_parameters()]
    dims = {name: tensor_dim(name) for name in names if tensor_dim(name) is not None}
    rows, columns = {f"layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qkv"}, 1
    assert dims == dict.fromkeys(rows, 0) | {f"layers.{i}.self_attn.o_proj.weight": columns for i in (0, 1)}
    for name in names:
        kind = "expert" if is_expert_parameter(name) else "tensor" if name in dims else "dense"
        assert placement_of(name).kind == kind
        assert placement_of(name, tensor_parallel=False).kind == kind.replace("tensor", "dense")
    model = make_model()
    groups = group_parameters(model.named_parameters(), tensor_parallel=True)
    of_kind = {group.name: set(group.parameters) for group in groups if group.placement.kind == "tensor"}
    assert of_kind == {"tensor_decay": set(dims)}


def test_tied_embeddings_are_listed_once():
    names = [n for g in group_parameters(make_model(tie_embeddings=True).named_parameters()) for n in g.parameters]
    assert "embed_tokens.weight" in names and "lm_head.weight" not in names


def test_empty_groups_are_left_out():
    groups = group_parameters(nn.Linear(3, 2).named_parameters())
    assert [(group.name, list(group.parameters)) for group in groups] == [
        ("dense_decay", ["weight"]),
        ("dense_no_decay", ["bias"]),
    ]


@pytest.mark.parametrize("part", ["router", "zero_computation.kind"])
@pytest.mark.parametrize(
    ("inside", "dims"),
    [
        ("shared_experts.gate_up_proj", 3),
        ("self_attn.q_proj.weight", 2),
        ("zero_computation.value", 2),
        ("input_layernorm.weight", 1),
        ("embed_tokens.weight", 2),
        ("router.weight", 2),
        ("mlp.down_proj.weight", 2),
    ],
)
def test_names_inside_a_registered_part_mean_nothing(part, inside, dims):
    name, parameter = f"layers.1.moe.{part}.{inside}", nn.Parameter(torch.empty((2,) * dims))
    assert split_name(name)[0] == part.partition(".")[0]
    assert placement_of(name) == DENSE and not is_expert_parameter(name) and tensor_dim(name) is None
    assert decays(name, parameter) == (dims >= (2 if part == "router" else 3))
    columns = ModuleNorms(2, torch.device("cpu"))._place(name)
    assert columns == (1, list(MODULES).index("router" if part == "router" else "zero_computation_experts"))

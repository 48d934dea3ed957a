"""Other implementations of a mixture-of-experts layer, with the weights of ours.

Each builder raises whatever its package raises where it cannot run; :mod:`moepp.bench.peers` lists that as the reason.

Shapes: T tokens, D width, F expert width, N experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.bench.cases import Case
from moepp.moe import MoELayer
from moepp.moe.router import LinearRouter

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contestant:
    """A layer as a function of [T, D], and the parameters that its backward must reach."""

    forward: Forward
    module: nn.Module


def router_weight(ours: MoELayer) -> Tensor:
    """[N, D]."""
    return cast(LinearRouter, ours.router).weight


class PlainLoop(nn.Module):
    """What one writes without a library: each expert picks its tokens, computes them and adds them up."""

    def __init__(self, ours: MoELayer) -> None:
        super().__init__()
        self.cfg = ours.cfg
        self.gate = nn.Parameter(router_weight(ours).detach().clone())
        experts = zip(ours.experts.gate_up_proj.detach(), ours.experts.down_proj.detach(), strict=True)
        self.experts = nn.ParameterList(
            nn.Parameter(part.clone()) for gate_up, down in experts for part in (*gate_up.chunk(2), down)
        )
        if self.cfg.num_constant_experts:
            self.alpha = nn.Parameter(ours.zero_computation.alpha_proj.detach().clone())
            self.value = nn.Parameter(ours.zero_computation.value.detach().clone())

    def forward(self, x_TD: Tensor) -> Tensor:
        probs = F.linear(x_TD.float(), self.gate.float()).softmax(dim=-1)
        weights, ids = probs.topk(self.cfg.top_k, dim=-1)
        weights = weights.masked_fill(ids >= self.cfg.kind_slices["zero"].start, 0.0)
        weights = (weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20)).to(x_TD.dtype)
        out_TD = torch.zeros_like(x_TD)
        for expert in range(self.cfg.kind_slices["zero"].start):
            tokens, places = torch.where(ids == expert)
            if tokens.numel():
                y = self._expert(expert, x_TD[tokens]) * weights[tokens, places, None]
                out_TD = out_TD.index_add(0, tokens, y)
        return out_TD

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        if expert < self.cfg.num_ffn_experts:
            gate, up, down = self.experts[3 * expert : 3 * expert + 3]
            return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        constant = expert - self.cfg.num_ffn_experts
        if constant < self.cfg.num_constant_experts:
            alpha = F.linear(x, self.alpha[constant]).softmax(dim=-1)
            return alpha[:, :1] * x + alpha[:, 1:] * self.value[constant]
        return x


def plain_loop(ours: MoELayer) -> Contestant:
    """Return a loop over experts in plain torch, with our weights."""
    module = PlainLoop(ours)
    return Contestant(module, module)


def mixtral(case: Case, ours: MoELayer, implementation: str) -> Contestant:
    """Return the MoE block of transformers' Mixtral, with our weights; needs transformers."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=case.hidden_size,
        intermediate_size=case.ffn_hidden_size,
        num_local_experts=case.num_ffn,
        num_experts_per_tok=case.top_k,
    )
    config._experts_implementation = implementation
    reference = ours.experts.gate_up_proj
    block: Any = MixtralSparseMoeBlock(config).to(device=reference.device, dtype=reference.dtype)
    with torch.no_grad():
        block.gate.weight.copy_(router_weight(ours))
        block.experts.gate_up_proj.copy_(ours.experts.gate_up_proj)
        block.experts.down_proj.copy_(ours.experts.down_proj)
    return Contestant(lambda x_TD: block(x_TD.unsqueeze(0)).squeeze(0), block)


class _SwiGLU(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.gate_up = nn.Linear(case.hidden_size, 2 * case.ffn_hidden_size, bias=False)
        self.down = nn.Linear(case.ffn_hidden_size, case.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def deepspeed(case: Case, ours: MoELayer) -> Contestant:
    """Return DeepSpeed's MoE layer, with our weights; needs deepspeed."""
    from deepspeed.moe.layer import MoE

    module = MoE(
        case.hidden_size,
        _SwiGLU(case),
        num_experts=case.num_ffn,
        k=case.top_k,
        drop_tokens=False,
        top2_2nd_expert_sampling=False,
    ).to(device=ours.experts.gate_up_proj.device, dtype=ours.experts.gate_up_proj.dtype)
    with torch.no_grad():
        inner: Any = module.deepspeed_moe
        inner.gate.wg.weight.copy_(router_weight(ours))
        for expert, copy in enumerate(inner.experts.deepspeed_experts):
            copy.gate_up.weight.copy_(ours.experts.gate_up_proj[expert])
            copy.down.weight.copy_(ours.experts.down_proj[expert])
    return Contestant(lambda x_TD: module(x_TD.unsqueeze(0))[0].squeeze(0), module)


def megatron(case: Case, ours: MoELayer) -> Contestant:
    """Return megatron-core's MoE layer, with our weights; needs megatron-core."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronLayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    reference = ours.experts.gate_up_proj
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    if reference.device.type != "cpu":
        model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=case.hidden_size,
        num_attention_heads=8,
        ffn_hidden_size=case.ffn_hidden_size,
        moe_ffn_hidden_size=case.ffn_hidden_size,
        num_moe_experts=case.num_ffn,
        moe_router_topk=case.top_k,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        bf16=reference.dtype == torch.bfloat16,
        params_dtype=reference.dtype,
    )
    spec: Any = get_moe_module_spec(use_te=False, num_experts=case.num_ffn, moe_grouped_gemm=False)
    module: Any = MegatronLayer(config, spec.submodules).to(device=reference.device, dtype=reference.dtype)
    module.set_layer_number(1)
    with torch.no_grad():
        module.router.weight.copy_(router_weight(ours))
        for expert, copy in enumerate(module.experts.local_experts):
            copy.linear_fc1.weight.copy_(ours.experts.gate_up_proj[expert])
            copy.linear_fc2.weight.copy_(ours.experts.down_proj[expert])
    return Contestant(lambda x_TD: module(x_TD.unsqueeze(1))[0].squeeze(1), module)


class _Float32Gate(nn.Linear):
    """What torchtitan's gate computes under its autocast to float32, which the CPU does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float())


def torchtitan(case: Case, ours: MoELayer) -> Contestant:
    """Build torchtitan's layer: softmax over all experts, normalised over the chosen ones; bfloat16 experts."""
    from torchtitan.models.common.linear import Linear  # pyright: ignore[reportMissingImports]
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter  # pyright: ignore[reportMissingImports]
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher  # pyright: ignore[reportMissingImports]

    reference = ours.experts.gate_up_proj
    if reference.dtype != torch.bfloat16:
        raise ValueError("its experts compute in bfloat16 alone")
    config = MoE.Config(
        num_experts=case.num_ffn,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(
                dim=case.hidden_size, hidden_dim=case.ffn_hidden_size, num_experts=case.num_ffn
            ),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=case.num_ffn, top_k=case.top_k),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=case.num_ffn,
            gate=Linear.Config(in_features=case.hidden_size, out_features=case.num_ffn),
            top_k=case.top_k,
            score_func="softmax",
            route_norm=True,
        ),
        load_balance_coeff=None,
    )
    module: Any = config.build()
    if reference.device.type == "cpu":
        module.router.gate = _Float32Gate(case.hidden_size, case.num_ffn, bias=False)
    module.to(device=reference.device, dtype=reference.dtype)
    experts = module.routed_experts.inner_experts
    with torch.no_grad():
        module.router.gate.weight.copy_(router_weight(ours))
        gate_EFD, up_EFD = ours.experts.gate_up_proj.chunk(2, dim=1)
        experts.w1_EFD.copy_(gate_EFD)
        experts.w3_EFD.copy_(up_EFD)
        experts.w2_EDF.copy_(ours.experts.down_proj)
    return Contestant(lambda x_TD: module(x_TD.unsqueeze(0)).squeeze(0), module)


def olmo_core(case: Case, ours: MoELayer) -> Contestant:
    """Build OLMo-core's dropless layer, without its losses."""
    from olmo_core.config import DType  # pyright: ignore[reportMissingImports]
    from olmo_core.nn.moe import MoEConfig, MoERouterConfig, MoEType  # pyright: ignore[reportMissingImports]

    reference = ours.experts.gate_up_proj
    config = MoEConfig(
        name=MoEType.dropless,
        num_experts=case.num_ffn,
        hidden_size=case.ffn_hidden_size,
        router=MoERouterConfig(top_k=case.top_k, normalize_expert_weights=1.0),
        lb_loss_weight=None,
        dtype=DType.from_pt(reference.dtype),
    )
    module: Any = config.build(case.hidden_size, init_device=str(reference.device))
    mlp = module.experts.mlp
    with torch.no_grad():
        module.router.weight.copy_(router_weight(ours).reshape(module.router.weight.shape))
        gate_EFD, up_EFD = ours.experts.gate_up_proj.chunk(2, dim=1)
        mlp.w1.copy_(gate_EFD.reshape(mlp.w1.shape))
        mlp.w3.copy_(up_EFD.reshape(mlp.w3.shape))
        mlp.w2.copy_(ours.experts.down_proj.transpose(1, 2).reshape(mlp.w2.shape))
    return Contestant(lambda x_TD: module(x_TD.unsqueeze(0)).squeeze(0), module)

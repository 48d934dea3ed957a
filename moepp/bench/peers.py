"""The same shapes, weights and tokens through other implementations of an MoE layer.

A peer that cannot run here is listed with its reason. All route by themselves with one and the same router weight,
which has learned to balance its load; all outputs are compared with ours.

Shapes: T tokens, D width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.bench.cases import CASES, Case, learn_balance, random_tokens
from moepp.bench.layer import PASSES
from moepp.bench.tables import Record
from moepp.bench.timing import clock_for, measure, threads
from moepp.distributed.groups import LaunchEnvironment, init_process_group
from moepp.moe import MoELayer
from moepp.moe.router import LinearRouter

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """What to measure."""

    cases: tuple[str, ...]
    tau: float  # of the MoE++ layer
    num_tokens: int
    dtype: torch.dtype
    device: torch.device
    num_threads: tuple[int, ...]
    rounds: int


@dataclass(frozen=True)
class Contestant:
    """A layer as a function of [T, D], and the parameters that its backward must reach."""

    forward: Forward
    module: nn.Module


def run(options: Options) -> dict[str, list[Record]]:
    """Return the table ``peers``: times, ratio to ours, largest difference from our output; or why one was skipped."""
    records: list[Record] = []
    with one_process_group(options.device):
        for count in options.num_threads:
            with threads(count):
                for name in options.cases:
                    records += [{"case": name, "threads": count} | r for r in _run_case(CASES[name], options)]
    return {"peers": records}


@contextmanager
def one_process_group(device: torch.device) -> Iterator[None]:
    """Make a process group of one, which some peers ask for."""
    if dist.is_initialized():
        yield
        return
    init_process_group(LaunchEnvironment(0, 1, 0), device, timeout_seconds=60)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _run_case(case: Case, options: Options) -> list[Record]:
    x_TD = random_tokens(options.num_tokens, case.hidden_size, options.dtype, options.device)
    records = []
    for tau in (None, options.tau):
        ours = _our_layer(case, tau, x_TD)
        builders = _vanilla_peers(case) if tau is None else {"plain loop": _plain_loop}
        contestants = {"moepp": Contestant(lambda x, layer=ours: layer(x).hidden, ours)}
        skipped: list[Record] = []
        for name, build in builders.items():
            try:
                contestants[name] = _checked(build(ours), x_TD)
            except Exception as error:  # whatever a peer raises here is its reason
                reason = (str(error).strip().splitlines() or [""])[0][:120]
                skipped.append({"peer": name, "skipped": f"{type(error).__name__}: {reason}"})
        family = "vanilla" if tau is None else f"MoE++ tau={tau}"
        records += [{"family": family} | record for record in [*_time(contestants, x_TD, options), *skipped]]
    return records


def _our_layer(case: Case, tau: float | None, x_TD: Tensor) -> MoELayer:
    torch.manual_seed(0)
    cfg = replace(case.config(tau), gating_residual=False)  # the peers have no such thing
    layer = MoELayer(cfg, case.hidden_size).to(device=x_TD.device, dtype=x_TD.dtype)
    learn_balance(layer, x_TD.detach())
    return layer


def _checked(contestant: Contestant, x_TD: Tensor) -> Contestant:
    """Run it once forward and backward, so that what cannot run fails here."""
    contestant.forward(x_TD).sum().backward()
    return contestant


def _time(contestants: dict[str, Contestant], x_TD: Tensor, options: Options) -> list[Record]:
    grad_TD = torch.randn_like(x_TD)
    with torch.no_grad():
        outputs = {name: one.forward(x_TD) for name, one in contestants.items()}
    clock = clock_for(options.device, torch.get_num_threads())
    records = []
    for direction in PASSES:
        runs = {name: _runner(one, direction, x_TD, grad_TD) for name, one in contestants.items()}
        timings = measure(runs, rounds=options.rounds, clock=clock)
        for name, timing in timings.items():
            difference = (outputs[name] - outputs["moepp"]).float().norm() / outputs["moepp"].float().norm()
            records.append(
                {
                    "pass": direction,
                    "peer": name,
                    "ms": timing.median,
                    "spread": timing.spread,
                    "x ours": timing.median / timings["moepp"].median,
                    "difference": float(difference),
                }
            )
    return records


def _runner(one: Contestant, direction: str, x_TD: Tensor, grad_TD: Tensor) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            one.forward(x_TD)

    def forward_backward() -> None:
        one.module.zero_grad(set_to_none=True)
        x_TD.grad = None
        one.forward(x_TD).backward(grad_TD)

    return forward if direction == "forward" else forward_backward


def _vanilla_peers(case: Case) -> dict[str, Callable[[MoELayer], Contestant]]:
    return {
        "plain loop": _plain_loop,
        "transformers eager": lambda ours: _mixtral(case, ours, "eager"),
        "transformers grouped_mm": lambda ours: _mixtral(case, ours, "grouped_mm"),
        "deepspeed": lambda ours: _deepspeed(case, ours),
        "megatron-core": lambda ours: _megatron(case, ours),
    }


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


def _plain_loop(ours: MoELayer) -> Contestant:
    module = PlainLoop(ours)
    return Contestant(module, module)


def _mixtral(case: Case, ours: MoELayer, implementation: str) -> Contestant:
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


def _deepspeed(case: Case, ours: MoELayer) -> Contestant:
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


def _megatron(case: Case, ours: MoELayer) -> Contestant:
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

"""Cases for the MoE layer: inputs made from a seed, the layer's run on one rank, and the comparison with the oracle.

A :class:`Case` is small and picklable, so that worker processes build their inputs themselves. Everything is drawn in
float64 and rounded to the case's dtype first: the oracle and the layer see the same numbers.

Shapes: T tokens, D width, F ffn width, N experts of all kinds, E FFN experts.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import torch

from moepp import MoEConfig, MoELayer
from moepp.distributed.comm import CommStats
from moepp.moe import ExpertParallel
from tests.oracle import Reference, moe_reference

Tensor = torch.Tensor

# Relative to the largest expected entry, by the dtype of what is compared. Measured over 200 random cases: 3e-15,
# 2.3e-6, 2.4e-2 at worst.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}
# Routing decided by less than this may differ by rounding alone: such a case compares nothing.
LEAST_MARGIN = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-4}

Choices = tuple[tuple[int, ...], ...]  # experts of each token, best first


@dataclass(frozen=True)
class Case:
    """One layer and its tokens on every rank."""

    cfg: MoEConfig
    tokens: tuple[int, ...] = (9,)  # T of each rank
    hidden_size: int = 6
    ep_size: int = 1
    seed: int = 0
    dtype: torch.dtype = torch.float64
    with_prev: bool = True  # give previous logits (where the layer has a gating residual)
    training: bool = True
    exchange_chunks: int = 1
    choices: tuple[Choices, ...] | None = None  # of each rank: the routing to force, whatever the seed


@dataclass(frozen=True)
class Inputs:
    """Full parameters, and per rank the tokens, previous logits and the gradients that arrive from above."""

    params: dict[str, Tensor]
    x: list[Tensor]  # [T, D]
    prev: list[Tensor | None]  # [T, N]
    grad_hidden: list[Tensor]  # [T, D]
    grad_logits: list[Tensor]  # [T, N]
    grad_aux: list[float]
    buffers: dict[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Observed:
    """What the layer gave on one rank."""

    hidden: Tensor
    router_logits: Tensor
    aux_loss: Tensor
    stats: dict[str, Tensor]
    grads: dict[str, Tensor | None]  # by parameter name, and "x", "prev"
    comm_stats: CommStats


def parameter_shapes(cfg: MoEConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the full layer: part of the interface (checkpoints, export)."""
    n, e, c, d, f = cfg.num_experts, cfg.num_ffn_experts, cfg.num_constant_experts, hidden_size, cfg.ffn_hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    if cfg.router in ("linear", "bias"):
        shapes["router.weight"] = (n, d)
    else:
        shapes |= {"router.fc1.weight": (8 * n, d), "router.fc2.weight": (n, 8 * n)}
    if cfg.gating_residual:
        shapes["router.gate_map.weight"] = (n, n)
    shapes |= {"experts.gate_up_proj": (e, 2 * f, d), "experts.down_proj": (e, d, f)}
    if c:
        shapes |= {"zero_computation.alpha_proj": (c, 2, d), "zero_computation.value": (c, d)}
    if cfg.extra_experts.get("scale"):
        shapes["zero_computation.scale.factor"] = (cfg.extra_experts["scale"], d)
    return shapes


def make_inputs(case: Case) -> Inputs:
    """Draw parameters and tokens; distinct numbers everywhere, gradients from above never ones."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype).double()

    cfg, d, n = case.cfg, case.hidden_size, case.cfg.num_experts
    params = {name: draw(*shape) * 0.7 for name, shape in parameter_shapes(cfg, d).items()}
    if cfg.router == "mlp":
        params["router.fc2.weight"] = params["router.fc2.weight"] * 0.4
    x = [draw(tokens, d) for tokens in case.tokens]
    prev = [draw(tokens, n) if case.with_prev and cfg.gating_residual else None for tokens in case.tokens]
    if case.choices is not None:
        _force(case, params, x, prev)
    return Inputs(
        params={name: value.to(case.dtype).double() for name, value in params.items()},
        x=[value.to(case.dtype).double() for value in x],
        prev=prev,
        grad_hidden=[draw(tokens, d) for tokens in case.tokens],
        grad_logits=[draw(tokens, n) * 0.1 for tokens in case.tokens],
        grad_aux=[float(value) for value in draw(len(case.tokens))],
        buffers={"router.bias": draw(n).float().double() * 0.125} if cfg.router == "bias" else {},
    )


def _force(case: Case, params: dict[str, Tensor], x: list[Tensor], prev: list[Tensor | None]) -> None:
    """Make the first N features of a token say which experts it wants, and the router read them."""
    n = case.cfg.num_experts
    if case.cfg.router != "linear" or case.hidden_size < n or case.choices is None:
        raise ValueError(f"forced choices need a linear router and hidden_size >= N={n}: {case}")
    params["router.weight"] = params["router.weight"] * 0.02
    params["router.weight"][:, :n] += 3 * torch.eye(n, dtype=torch.float64)
    if case.cfg.gating_residual:
        params["router.gate_map.weight"] *= 0.02
    for x_TD, choices in zip(x, case.choices, strict=True):
        for t, experts in enumerate(choices):
            x_TD[t, :n] = x_TD[t, :n] * 0.03 - 1
            for place, expert in enumerate(experts):
                x_TD[t, expert] += 3 - 0.5 * place


def local_slice(name: str, value: Tensor, ep_rank: int, ep_size: int) -> Tensor:
    """The part of a full parameter, or of its gradient, that one rank of the expert-parallel group holds."""
    if not name.startswith("experts."):
        return value
    count = value.shape[0] // ep_size
    return value[ep_rank * count : (ep_rank + 1) * count]


def build_layer(
    case: Case, inputs: Inputs, rank: int = 0, device: torch.device | str = "cpu", **groups: Any
) -> MoELayer:
    """The layer of one rank with the case's parameters; names and shapes must be exactly the documented ones."""
    layer = MoELayer(case.cfg, case.hidden_size, layer_index=1, **groups)
    state = {name: local_slice(name, value, rank % case.ep_size, case.ep_size) for name, value in inputs.params.items()}
    state |= inputs.buffers
    layer.load_state_dict(state, strict=True)
    layer.to(device, case.dtype).load_state_dict(state, strict=True)
    return layer.train(case.training)


def run_layer(
    case: Case,
    rank: int = 0,
    selection_share: Tensor | None = None,
    device: torch.device | str = "cpu",
    **groups: Any,
) -> Observed:
    """Forward and backward on one rank; ``groups`` are ``ep_group`` and ``balance_group``.

    The layer and all that it sees lie on ``device``, what comes out on the CPU: the oracle computes there.
    """
    inputs, comm_stats = make_inputs(case), CommStats()
    parallel = ExpertParallel(groups.get("ep_group"), groups.get("balance_group"), comm_stats, case.exchange_chunks)
    layer = build_layer(case, inputs, rank, device, parallel=parallel)
    x_TD = inputs.x[rank].to(device, case.dtype).requires_grad_()
    prev = inputs.prev[rank]
    prev_TN = None if prev is None else prev.to(device, case.dtype).requires_grad_()
    out = layer(x_TD, prev_TN, None if selection_share is None else selection_share.to(device))
    grad_hidden, grad_logits = inputs.grad_hidden[rank].to(device), inputs.grad_logits[rank].to(device)
    loss = (out.hidden * grad_hidden).sum() + (out.router_logits * grad_logits).sum()
    (loss + inputs.grad_aux[rank] * out.aux_loss).backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()} | {"x": x_TD.grad}
    if prev_TN is not None:
        grads["prev"] = prev_TN.grad
    names = {field.name for field in dataclasses.fields(out.stats)} - {"kinds", "observation"}
    stats = {name: getattr(out.stats, name) for name in names}
    shares = stats.pop("share_Z")
    stats |= {f"share_{kind}": share for kind, share in zip(out.stats.kinds, shares, strict=True)}
    require_device(out.hidden, device, "the output")
    on_host = [value.detach().cpu() for value in (out.hidden, out.router_logits, out.aux_loss)]
    return Observed(*on_host, _to_host(stats), _to_host(grads), comm_stats)


def require_device(tensor: Tensor, device: torch.device | str, name: str) -> None:
    """A test that asks for a GPU must not pass on the CPU."""
    assert tensor.device.type == torch.device(device).type, f"{name} lies on {tensor.device}, not on {device}"


def _to_host(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in tensors.items()}


@dataclass(frozen=True)
class Expected:
    """What one rank must give: the oracle's results and gradients (of full parameters)."""

    reference: Reference
    grads: dict[str, Tensor]


def expect(case: Case, selection_share: list[float] | None = None) -> list[Expected]:
    """The oracle on every rank. Gradients of FFN experts are summed over each expert-parallel group."""
    inputs = make_inputs(case)
    params = {name: value.clone().requires_grad_() for name, value in inputs.params.items()}
    x = [value.clone().requires_grad_() for value in inputs.x]
    prev = [None if value is None else value.clone().requires_grad_() for value in inputs.prev]
    options: dict[str, Any] = {"training": case.training, "ep_size": case.ep_size, "selection_share": selection_share}
    references = moe_reference(case.cfg, params | inputs.buffers, x, prev, **options)
    grads_by_rank = []
    for rank, reference in enumerate(references):
        loss = (reference.hidden_TD * inputs.grad_hidden[rank]).sum()
        loss = loss + (reference.router_logits_TN * inputs.grad_logits[rank]).sum()
        loss = loss + inputs.grad_aux[rank] * reference.aux_loss
        given = {"x": x[rank], "prev": prev[rank]}
        wanted = params | {name: value for name, value in given.items() if value is not None}
        values = torch.autograd.grad(loss, tuple(wanted.values()), allow_unused=True, materialize_grads=True)
        grads_by_rank.append(dict(zip(wanted, values, strict=True)))
    expected = []
    for rank, reference in enumerate(references):
        group = range(rank - rank % case.ep_size, rank - rank % case.ep_size + case.ep_size)
        grads = {
            name: sum((grads_by_rank[peer][name] for peer in group), torch.zeros_like(value))
            if name.startswith("experts.")
            else value
            for name, value in grads_by_rank[rank].items()
        }
        expected.append(Expected(reference, grads))
    return expected


def assert_agrees(case: Case, observed: Observed, expected: Expected, rank: int = 0) -> None:
    """Outputs, losses, statistics and all gradients of one rank agree with the oracle."""
    reference = expected.reference
    least = LEAST_MARGIN[case.dtype]
    assert reference.margin > least, f"routing hangs on {reference.margin:.1e}: choose another seed for {case}"
    if case.choices is not None:
        assert [tuple(gates) for gates in reference.gates] == list(case.choices[rank]), "the routing was not forced"
    router_dtype = torch.promote_types(case.dtype, torch.float32)
    assert observed.hidden.dtype == case.dtype and observed.router_logits.dtype == router_dtype
    _assert_close(case, "hidden", observed.hidden, reference.hidden_TD)
    _assert_close(case, "router_logits", observed.router_logits, reference.router_logits_TN)
    _assert_close(case, "aux_loss", observed.aux_loss, reference.aux_loss)
    _assert_stats(case, observed.stats, reference.stats)
    assert set(observed.grads) == set(expected.grads)
    for name, grad in observed.grads.items():
        assert grad is not None, f"{name} got no gradient (None): {case}"
        wanted = local_slice(name, expected.grads[name], rank % case.ep_size, case.ep_size)
        _assert_close(case, f"gradient of {name}", grad, wanted)


def _assert_stats(case: Case, observed: dict[str, Tensor], wanted: dict[str, Any]) -> None:
    assert set(observed) == set(wanted)
    for name, value in observed.items():
        assert not value.requires_grad, f"stats.{name} carries a graph"
        if name == "z_loss" and case.cfg.z_loss_weight == 0:
            continue  # not computed while it is switched off
        target = torch.tensor(wanted[name], dtype=torch.float64)
        exact = name in ("load_E", "num_tokens", "ffn_assignments", "remote_assignments")
        tolerance = 0.0 if exact else TOLERANCE[torch.float32]
        torch.testing.assert_close(value.double(), target, rtol=tolerance, atol=tolerance, msg=_message(case, name))


def _assert_close(case: Case, name: str, observed: Tensor, wanted: Tensor) -> None:
    wanted = wanted.detach()
    assert observed.shape == wanted.shape, f"{name} has shape {list(observed.shape)}, not {list(wanted.shape)}: {case}"
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    atol = TOLERANCE[observed.dtype] * scale
    torch.testing.assert_close(observed.double(), wanted, rtol=0, atol=atol, msg=_message(case, name))


def _message(case: Case, name: str) -> Any:
    return lambda text: f"{name} differs from the oracle: {text}\n{case}"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0] or [1]


def draw_case(seed: int, dtype: torch.dtype, ranks: int = 1, ep_size: int = 1) -> Case:
    """A random case. Same seed, same case; another input seed is taken until no choice hangs on rounding."""
    pick = random.Random(seed)
    while True:
        counts = {
            "num_ffn_experts": pick.choice((0, 1, 2, 3, 4)) * ep_size,
            "num_constant_experts": pick.choice((0, 1, 2, 3)),
            "num_copy_experts": pick.choice((0, 1, 1, 2)),
            "num_zero_experts": pick.choice((0, 1, 1, 2)),
        }
        if sum(counts.values()) > 0:
            break
    n = sum(counts.values())
    cfg = MoEConfig(
        **counts,
        ffn_hidden_size=pick.choice((1, 3, 5)),
        top_k=pick.choice((1, min(2, n), min(2, n), min(3, n), n)),
        router=pick.choice(("linear", "mlp")),
        gating_residual=pick.random() < 0.7,
        logits_norm_std=pick.choice((None, None, 0.5, 1.0, 2.0)) if n > 2 else None,
        gate_normalization=pick.choice(("zero_masked", "none", "topk_softmax")),
        scale_input_by_top_k=pick.random() < 0.3,
        tau=pick.choice((0.1, 0.25, 0.75, 1.0, 1.5)),
        capacity_factor=pick.choice((None, 0.4, 0.8, 1.1)),
        drop_policy=pick.choice(("weight", "position")),
        balance_loss_weight=pick.choice((0.0, 0.3, 1.0)),
        balance_loss_scope=pick.choice(("micro_batch", "data_parallel", "global_batch")),
        balance_loss_switch_scale=pick.random() < 0.3,
        z_loss_weight=pick.choice((0.0, 0.05)),
    )
    case = Case(
        cfg,
        tokens=tuple(pick.choice((0, 1, 3, 7, 12)) if ranks > 1 else pick.choice((1, 2, 7, 12)) for _ in range(ranks)),
        hidden_size=pick.choice((2, 5, 8)),
        ep_size=ep_size,
        dtype=dtype,
        with_prev=pick.random() < 0.8,
        training=pick.random() < 0.9,
        exchange_chunks=pick.choice(_divisors(counts["num_ffn_experts"] // ep_size)) if ep_size > 1 else 1,
    )
    while True:
        case = dataclasses.replace(case, seed=pick.randrange(2**31))
        if min(expected.reference.margin for expected in expect(case)) > 10 * LEAST_MARGIN[dtype]:
            return case

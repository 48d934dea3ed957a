"""The MoE++ layer against the vanilla layer of the same size and against its bare matrix products.

Shapes: T tokens, D width, F expert width, E FFN experts, K experts per token, R = T·K assignments of the vanilla layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepp.bench.cases import CASES, Case, ForcedRouting, learn_balance, make_layer, random_tokens
from moepp.bench.memory import measure_memory
from moepp.bench.stages import stage_times
from moepp.bench.tables import Record
from moepp.bench.timing import Timing, clock_for, measure, threads
from moepp.moe import MoELayer
from moepp.ops import multiplies_in_float32

PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Options:
    """What to measure; ``taus`` of the MoE++ layers, ``num_threads`` one table each."""

    cases: Sequence[str]
    taus: Sequence[float]
    num_tokens: int
    dtype: torch.dtype
    device: torch.device
    num_threads: Sequence[int]
    rounds: int
    learned: bool = True


def run(options: Options) -> dict[str, list[Record]]:
    """Return the tables ``times`` (all layers of all cases, interleaved), ``stages`` and ``memory``."""
    tables: dict[str, list[Record]] = {"times": [], "stages": [], "memory": []}
    for count in options.num_threads:
        with threads(count):
            for name in options.cases:
                times, stages = run_case(name, options)
                tables["times"] += [{"case": name, "threads": count} | record for record in times]
                tables["stages"] += [{"case": name, "threads": count} | record for record in stages]
    for name in options.cases:
        for tau in (None, *options.taus):
            record = measure_memory(CASES[name], tau, options.num_tokens, options.dtype, options.device)
            tables["memory"].append({"case": name} | record)
    return tables


class _Contestant:
    """A layer with its routing, and its FFN assignments per token."""

    def __init__(self, name: str, layer: MoELayer, x_TD: Tensor, tau: float | None, forced: bool = True) -> None:
        self.name, self.layer, self.x_TD, self.tau = name, layer, x_TD, tau
        self.grad_TD = torch.randn_like(x_TD)
        self.routing = ForcedRouting(layer, x_TD.shape[0]) if forced else None
        self.ffn_per_token = float(self._call().stats.ffn_per_token)

    def _call(self):
        if self.routing is None:
            return self.layer(self.x_TD)
        with self.routing:
            return self.layer(self.x_TD)

    def forward(self) -> None:
        with torch.no_grad():
            self._call()

    def forward_backward(self) -> None:
        self.layer.zero_grad(set_to_none=True)
        self.x_TD.grad = None
        out = self._call()
        torch.autograd.backward([out.hidden, out.aux_loss], [self.grad_TD, None])

    def passes(self) -> dict[str, Callable[[], None]]:
        return {"forward": self.forward, "forward+backward": self.forward_backward}


def run_case(name: str, options: Options) -> tuple[list[Record], list[Record]]:
    """Return times and stages of one case, with as many threads as torch has now."""
    case = CASES[name]
    x_TD = random_tokens(options.num_tokens, case.hidden_size, options.dtype, options.device)
    layers = [_Contestant("vanilla", make_layer(case, None, options.dtype, options.device), x_TD, None)]
    for tau in options.taus:
        layers.append(_Contestant("MoE++", make_layer(case, tau, options.dtype, options.device), x_TD, tau))
        if options.learned:
            learned = make_layer(case, tau, options.dtype, options.device)
            learn_balance(learned, x_TD.detach())
            layers.append(_Contestant("MoE++ learned", learned, x_TD, tau, forced=False))
    bare = {
        "forward": bare_forward(layers[0].layer, options.num_tokens * case.top_k),
        "forward+backward": bare_forward_backward(layers[0].layer, options.num_tokens * case.top_k),
    }
    clock = clock_for(options.device, torch.get_num_threads())
    records = []
    for direction in PASSES:
        runs = {"bare matmuls": bare[direction]}
        runs |= {f"{one.name} {one.tau}": one.passes()[direction] for one in layers}
        timings = measure(runs, rounds=options.rounds, clock=clock)
        records += _records(case, options, direction, layers, timings)
    chosen = [layers[0], *(one for one in layers if one.tau == options.taus[0] and one.routing)]
    return records, [record for one in chosen for record in _stages(one)]


def _records(
    case: Case, options: Options, direction: str, layers: list[_Contestant], timings: dict[str, Timing]
) -> list[Record]:
    factor = 1 if direction == "forward" else 3  # backward has two products for each of forward
    bare, vanilla = timings["bare matmuls"], timings["vanilla None"]
    num_assignments = options.num_tokens * case.top_k
    rows: list[Record] = [
        {
            "pass": direction,
            "layer": "bare matmuls",
            "ms": bare.median,
            "spread": bare.spread,
            "GFLOP/s": factor * case.expert_flops(num_assignments) / bare.median / 1e6,
        }
    ]
    for one in layers:
        timing = timings[f"{one.name} {one.tau}"]
        speedup = vanilla.median / timing.median
        # The limit of the assignments that were really drawn, which a finite sample moves a little.
        limit = case.top_k / one.ffn_per_token if one.tau else None
        rows.append(
            {
                "pass": direction,
                "layer": one.name,
                "tau": one.tau,
                "ffn/token": one.ffn_per_token,
                "ms": timing.median,
                "spread": timing.spread,
                "GFLOP/s": factor * case.expert_flops(options.num_tokens * one.ffn_per_token) / timing.median / 1e6,
                "x bare": timing.median / bare.median if one.tau is None else None,
                "speed-up": speedup if one.tau else None,
                "limit": limit,
                "share of limit": speedup / limit if limit else None,
            }
        )
    return rows


def _stages(one: _Contestant) -> list[Record]:
    times = stage_times(one.layer, one.forward_backward)
    times["whole"] = (sum(forward for forward, _ in times.values()), sum(backward for _, backward in times.values()))
    return [
        {
            "layer": one.name,
            "tau": one.tau,
            "stage": stage,
            "forward ms": forward,
            "backward ms": backward,
            "share": (forward + backward) / sum(times["whole"]),
        }
        for stage, (forward, backward) in times.items()
    ]


def _rows_per_expert(layer: MoELayer, num_assignments: int) -> int:
    return max(num_assignments // layer.cfg.num_ffn_experts, 1)


def _factors(layer: MoELayer) -> tuple[Tensor, Tensor]:
    """Return the experts' weights in the dtype in which torch multiplies fastest here."""
    weights = layer.experts.gate_up_proj.detach(), layer.experts.down_proj.detach()
    return (weights[0].float(), weights[1].float()) if multiplies_in_float32(weights[0]) else weights


def bare_forward(layer: MoELayer, num_assignments: int) -> Callable[[], None]:
    """Return a function that does the vanilla layer's matrix products alone, on prepared rows."""
    gate_up_EGD, down_EDF = _factors(layer)
    count = _rows_per_expert(layer, num_assignments)
    x_RD = torch.randn(count * len(gate_up_EGD), gate_up_EGD.shape[2]).to(gate_up_EGD)
    hidden_CG, act_CF = x_RD.new_empty(count, gate_up_EGD.shape[1]), x_RD.new_ones(count, down_EDF.shape[2])
    out_RD = torch.empty_like(x_RD)

    def run() -> None:
        for expert, (gate_up_GD, down_DF) in enumerate(zip(gate_up_EGD, down_EDF, strict=True)):
            rows = slice(expert * count, (expert + 1) * count)
            torch.mm(x_RD[rows], gate_up_GD.t(), out=hidden_CG)
            torch.mm(act_CF, down_DF.t(), out=out_RD[rows])

    return run


def bare_forward_backward(layer: MoELayer, num_assignments: int) -> Callable[[], None]:
    """As :func:`bare_forward` with the four products of backward, in the form that autograd gives them."""
    forward = bare_forward(layer, num_assignments)
    gate_up_EGD, down_EDF = _factors(layer)
    count = _rows_per_expert(layer, num_assignments)
    x_RD = torch.randn(count * len(gate_up_EGD), gate_up_EGD.shape[2]).to(gate_up_EGD)
    hidden_CG, act_CF = x_RD.new_ones(count, gate_up_EGD.shape[1]), x_RD.new_ones(count, down_EDF.shape[2])
    grad_gate_up_EGD, grad_down_EDF = torch.empty_like(gate_up_EGD), torch.empty_like(down_EDF)
    grad_RD = torch.empty_like(x_RD)

    def run() -> None:
        forward()
        for expert, (gate_up_GD, down_DF) in enumerate(zip(gate_up_EGD, down_EDF, strict=True)):
            rows = slice(expert * count, (expert + 1) * count)
            torch.mm(x_RD[rows], down_DF, out=act_CF)
            torch.mm(x_RD[rows].t(), act_CF, out=grad_down_EDF[expert])
            torch.mm(hidden_CG.t(), x_RD[rows], out=grad_gate_up_EGD[expert])
            torch.mm(hidden_CG, gate_up_GD, out=grad_RD[rows])

    return run

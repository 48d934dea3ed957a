"""The same shapes, weights and tokens through other implementations of an MoE layer.

A peer that cannot run here is listed with its reason. All route by themselves with one and the same router weight,
which has learned to balance its load; all outputs are compared with ours.

Shapes: T tokens, D width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moepp.bench.cases import CASES, Case, learn_balance, random_tokens
from moepp.bench.layer import PASSES
from moepp.bench.peer_layers import Contestant, deepspeed, megatron, mixtral, olmo_core, plain_loop, torchtitan
from moepp.bench.tables import Record
from moepp.bench.timing import clock_for, measure, threads
from moepp.distributed.groups import LaunchEnvironment, init_process_group
from moepp.moe import MoELayer


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
        builders = _vanilla_peers(case) if tau is None else {"plain loop": plain_loop}
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
        "plain loop": plain_loop,
        "transformers eager": lambda ours: mixtral(case, ours, "eager"),
        "transformers grouped_mm": lambda ours: mixtral(case, ours, "grouped_mm"),
        "torchtitan": lambda ours: torchtitan(case, ours),
        "OLMo-core": lambda ours: olmo_core(case, ours),
        "deepspeed": lambda ours: deepspeed(case, ours),
        "megatron-core": lambda ours: megatron(case, ours),
    }

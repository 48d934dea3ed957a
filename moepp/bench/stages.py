"""Where a layer's time goes: forward by what its parts are, backward by what the forward of each node belonged to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from moepp.moe import MoELayer

_PREFIX = "stage: "
OTHER = "other"  # the layer's own glue, and copying gradients into the parameters


@contextmanager
def _replaced(owner: Any, name: str, stage: str) -> Iterator[None]:
    original = getattr(owner, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        with record_function(_PREFIX + stage):
            return original(*args, **kwargs)

    had_own = name in vars(owner)
    object.__setattr__(owner, name, recorded)
    try:
        yield
    finally:
        if had_own:
            object.__setattr__(owner, name, original)
        else:
            object.__delattr__(owner, name)


@contextmanager
def _recorded(layer: MoELayer) -> Iterator[None]:
    """Name the stages of the layer's forward for the profiler."""
    with ExitStack() as stack:
        for owner, name, stage in (
            (layer.router, "forward", "router"),
            (layer.router, "choose", "select"),
            (layer, "assign", "select"),
            (layer.dispatcher, "dispatch", "permute"),
            (layer.dispatcher, "receive", "exchange"),
            (layer.dispatcher, "send_back", "exchange"),
            (layer.zero_computation, "forward", "zero-computation"),
            (layer.experts, "forward", "FFN"),
            (layer.dispatcher, "combine", "combine"),
            (layer, "_summarize", "losses"),
        ):
            stack.enter_context(_replaced(owner, name, stage))
        yield


def stage_times(
    layer: MoELayer, forward_backward: Callable[[], object], repeats: int = 5
) -> dict[str, tuple[float, float]]:
    """Return milliseconds (forward, backward) of each stage, means of profiled runs, which sum to the whole."""
    forward_backward()
    with _recorded(layer), profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            with record_function("whole"):
                forward_backward()
    return attribute(profiler.events(), repeats)


def attribute(events: Any, repeats: int) -> dict[str, tuple[float, float]]:
    """Sum the profiler's events by stage."""
    totals: dict[str, list[float]] = {}
    stage_of_node: dict[int, str] = {}
    backward_total = 0.0
    for event in events:
        if event.name.startswith(_PREFIX):
            stage = event.name[len(_PREFIX) :]
            totals.setdefault(stage, [0.0, 0.0])[0] += event.time_range.elapsed_us()
            stage_of_node.update((number, stage) for number in _sequence_numbers(event))
    totals[OTHER] = [0.0, 0.0]
    for event in events:
        if event.name.startswith("autograd::engine::evaluate_function"):
            elapsed = event.time_range.elapsed_us()
            backward_total += elapsed
            totals[stage_of_node.get(event.sequence_nr, OTHER)][1] += elapsed
    whole = sum(event.time_range.elapsed_us() for event in events if event.name == "whole")
    totals[OTHER][0] = whole - backward_total - sum(forward for forward, _ in totals.values())
    return {stage: (forward / repeats / 1e3, back / repeats / 1e3) for stage, (forward, back) in totals.items()}


def _sequence_numbers(event: Any) -> Iterator[int]:
    for child in event.cpu_children:
        if child.sequence_nr >= 0:
            yield child.sequence_nr
        yield from _sequence_numbers(child)

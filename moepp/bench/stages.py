"""Where a layer's time goes: forward by what its parts are, backward by what the forward of each node belonged to.

On the CPU these are the times of the calls, on an accelerator those of the kernels that the calls launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
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
    device = next(layer.parameters()).device
    activities = [ProfilerActivity.CPU]
    if device.type != "cpu":
        activities.append(ProfilerActivity.CUDA)
    forward_backward()
    with _recorded(layer), profile(activities=activities) as profiler:
        for _ in range(repeats):
            with record_function("whole"):
                forward_backward()
        if device.type != "cpu":
            torch.accelerator.synchronize()
    return attribute(profiler.events(), repeats, on_device=device.type != "cpu")


def attribute(events: Any, repeats: int, on_device: bool = False) -> dict[str, tuple[float, float]]:
    """Sum the profiler's events by stage; ``on_device``: the time of what they launched."""
    calls = [event for event in events if event.device_type == DeviceType.CPU]  # devices repeat the names of stages

    def time(event: Any) -> float:
        return event.device_time_total if on_device else event.time_range.elapsed_us()

    totals: dict[str, list[float]] = {}
    stage_of_node: dict[int, str] = {}
    backward_total = 0.0
    for event in calls:
        if event.name.startswith(_PREFIX):
            stage = event.name[len(_PREFIX) :]
            totals.setdefault(stage, [0.0, 0.0])[0] += time(event)
            stage_of_node.update((number, stage) for number in _sequence_numbers(event))
    totals[OTHER] = [0.0, 0.0]
    for event in calls:
        if event.name.startswith("autograd::engine::evaluate_function"):
            backward_total += time(event)
            totals[stage_of_node.get(event.sequence_nr, OTHER)][1] += time(event)
    if on_device:  # backward runs in a thread of its own, outside the event of the whole
        whole = sum(event.self_device_time_total for event in calls)
    else:
        whole = sum(time(event) for event in calls if event.name == "whole")
    totals[OTHER][0] = whole - backward_total - sum(forward for forward, _ in totals.values())
    return {stage: (forward / repeats / 1e3, back / repeats / 1e3) for stage, (forward, back) in totals.items()}


def _sequence_numbers(event: Any) -> Iterator[int]:
    for child in event.cpu_children:
        if child.sequence_nr >= 0:
            yield child.sequence_nr
        yield from _sequence_numbers(child)

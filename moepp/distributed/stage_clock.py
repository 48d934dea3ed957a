"""How long each stage of an optimizer step takes, without waiting for a device.

On the CPU the wall clock is read. On an accelerator an event is recorded on the stream that computes: the time between
two events is what the device spent, or stood still, between them. Events are read once the device has passed them.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

STAGES = ("data", "forward", "exchange", "backward", "reduction", "optimizer", "pipeline", "other")
"""Of a step, in the order in which they are logged; "other" is what is in none."""

_OTHER = "other"


class _Marks(Protocol):
    """Instants of a step."""

    def begin(self) -> None:
        """Start a step."""
        ...

    def mark(self, stage: str) -> None:
        """Add the time since the last instant to ``stage``."""
        ...

    def end(self) -> None:
        """End the step."""
        ...

    def take(self) -> tuple[dict[str, float], int]:
        """Return seconds by stage, and the steps that they are of; start anew."""
        ...


class _HostMarks:
    """By the wall clock."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last = 0.0
        self._step: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._steps = 0

    def begin(self) -> None:
        self._step = {}
        self._last = self._now()

    def mark(self, stage: str) -> None:
        now = self._now()
        self._step[stage] = self._step.get(stage, 0.0) + now - self._last
        self._last = now

    def end(self) -> None:
        for stage, seconds in self._step.items():
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        self._steps += 1

    def take(self) -> tuple[dict[str, float], int]:
        taken = self._seconds, self._steps
        self._seconds, self._steps = {}, 0
        return taken


class _DeviceMarks:
    """By events on the current stream; a step counts once the device has passed its last one.

    Args:
        make_event: returns a new event that keeps its time.
    """

    def __init__(self, make_event: Callable[[], Any]) -> None:
        self._make_event = make_event
        self._free: list[Any] = []
        self._step: list[tuple[str, Any]] = []
        self._ended: deque[list[tuple[str, Any]]] = deque()
        self._seconds: dict[str, float] = {}
        self._steps = 0

    def begin(self) -> None:
        self._read_passed()  # else each step would need events of its own until times are taken
        self._free += [event for _, event in self._step]  # of a step that was not ended
        self._step = []
        self.mark(_OTHER)

    def mark(self, stage: str) -> None:
        event = self._free.pop() if self._free else self._make_event()
        event.record()
        self._step.append((stage, event))

    def end(self) -> None:
        self._ended.append(self._step)
        self._step = []

    def take(self) -> tuple[dict[str, float], int]:
        self._read_passed()
        taken = self._seconds, self._steps
        self._seconds, self._steps = {}, 0
        return taken

    def _read_passed(self) -> None:
        """Add up the steps that the device has passed, and free their events."""
        while self._ended and self._ended[0][-1][1].query():
            events = self._ended.popleft()
            for (_, before), (stage, after) in itertools.pairwise(events):
                self._seconds[stage] = self._seconds.get(stage, 0.0) + before.elapsed_time(after) / 1e3
            self._free += [event for _, event in events]
            self._steps += 1


class StageClock:
    """Splits the time of steps into stages, each without the stages inside it.

        with clock.step():
            with clock.stage("forward"):
                ...  # counted as forward
                with clock.stage("exchange"):
                    ...  # counted as exchange
            ...  # counted as other

    Outside a step, in evaluation say, nothing is measured.

    Args:
        device: that computes; None: measure nothing.
        marks: for tests: where the instants come from.

    Attributes:
        is_on: False measures nothing, from the next step on.
    """

    def __init__(self, device: torch.device | None = None, marks: _Marks | None = None) -> None:
        if marks is None and device is not None:
            marks = _HostMarks() if device.type == "cpu" else _DeviceMarks(lambda: _event(device))
        self._marks = marks
        self.is_on = True
        self._is_running = False
        self._stages = [_OTHER]
        self._contexts = {name: _Within(self, name) for name in STAGES}
        self._of_step = _Step(self)

    def step(self) -> _Step:
        """Return a context in which a step is measured."""
        return self._of_step

    def stage(self, name: str) -> _Within:
        """Return a context whose time counts as stage ``name``, one of :data:`STAGES`."""
        return self._contexts[name]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, counted as stage ``name``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return run

    def take(self) -> tuple[dict[str, float], int]:
        """Return seconds by stage of the steps since the last call, and how many those are.

        On an accelerator the last step may be missing, which the next call has then: nothing is waited for.
        """
        return self._marks.take() if self._marks is not None else ({}, 0)

    def _begin(self) -> None:
        if self._marks is not None and self.is_on:
            self._is_running, self._stages = True, [_OTHER]
            self._marks.begin()

    def _end(self, is_whole: bool) -> None:
        if self._marks is not None and self._is_running:
            self._marks.mark(self._stages[-1])
            self._is_running = False
            if is_whole:
                self._marks.end()

    def _enter(self, name: str) -> None:
        if self._is_running and self._marks is not None:
            self._marks.mark(self._stages[-1])
            self._stages.append(name)

    def _leave(self) -> None:
        if self._is_running and self._marks is not None:
            self._marks.mark(self._stages.pop())


class _Within:
    def __init__(self, clock: StageClock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock._enter(self._name)

    def __exit__(self, *_: object) -> None:
        self._clock._leave()


class _Step:
    def __init__(self, clock: StageClock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        self._clock._begin()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._clock._end(is_whole=kind is None)


def _event(device: torch.device) -> Any:
    return torch.Event(device=device, enable_timing=True)

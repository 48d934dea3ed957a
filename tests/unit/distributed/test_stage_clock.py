"""Times of nested stages, by the host's clock and by a device's events, both imitated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moepp.distributed.stage_clock import StageClock, _DeviceMarks, _HostMarks


class Machine:
    """A clock that is set by hand, and a device that is ``lag`` seconds behind the host."""

    def __init__(self) -> None:
        self.now, self.passed_until, self.events = 0.0, 0.0, 0

    def make_event(self) -> Any:
        machine = self
        machine.events += 1

        class Event:
            def record(self) -> None:
                self.at = machine.now

            def query(self) -> bool:
                return self.at <= machine.passed_until

            def elapsed_time(self, end: Any) -> float:
                assert self.query() and end.query(), "read before the device has passed it"
                return (end.at - self.at) * 1e3

        return Event()


def take_step(clock: StageClock, machine: Machine) -> None:
    """1 s of data, 2 + 4 s of forward around 8 s of exchange, 16 s of backward, 32 s of nothing."""
    with clock.step():
        for name, seconds in (("data", 1), ("forward", 2)):
            with clock.stage(name):
                machine.now += seconds
                if name == "forward":
                    with clock.stage("exchange"):
                        machine.now += 8
                    machine.now += 4
        clock.timed("backward", lambda seconds: setattr(machine, "now", machine.now + seconds))(16)
        machine.now += 32


EXPECTED = {"data": 1, "forward": 6, "exchange": 8, "backward": 16, "other": 32}


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.mark.parametrize("kind", ["host", "device"])
def test_a_stage_does_not_count_what_is_inside_it(machine: Machine, kind: str) -> None:
    marks = _HostMarks(lambda: machine.now) if kind == "host" else _DeviceMarks(machine.make_event)
    clock = StageClock(marks=marks)
    take_step(clock, machine)
    machine.now += 1000  # between the steps
    with clock.stage("exchange"):
        machine.now += 1000  # of an evaluation
    take_step(clock, machine)
    machine.passed_until = machine.now
    seconds, steps = clock.take()
    assert steps == 2
    assert {name: time for name, time in seconds.items() if time} == {name: 2 * t for name, t in EXPECTED.items()}
    assert clock.take() == ({}, 0)


def test_a_step_that_the_device_has_not_finished_is_counted_later_and_waits_for_nothing(machine: Machine) -> None:
    clock = StageClock(marks=_DeviceMarks(machine.make_event))
    take_step(clock, machine)
    machine.passed_until = machine.now
    take_step(clock, machine)
    machine.passed_until = machine.now - 1  # its last event is still to come
    assert clock.take()[1] == 1
    machine.passed_until = machine.now
    seconds, steps = clock.take()
    assert (steps, seconds["backward"]) == (1, 16)
    made = machine.events
    take_step(clock, machine)
    assert machine.events == made  # events are used again


def test_events_are_used_again_however_long_nobody_takes_the_times(machine: Machine) -> None:
    clock = StageClock(marks=_DeviceMarks(machine.make_event))
    take_step(clock, machine)
    of_a_step = machine.events
    for _ in range(999):
        machine.passed_until = machine.now - 70  # more than a step behind
        take_step(clock, machine)
    assert machine.events <= 3 * of_a_step
    machine.passed_until = machine.now
    seconds, steps = clock.take()
    assert steps == 1000
    assert {name: time for name, time in seconds.items() if time} == {name: 1000 * t for name, t in EXPECTED.items()}


@pytest.mark.parametrize("kind", ["host", "device"])
def test_a_step_that_fails_is_left_out(machine: Machine, kind: str) -> None:
    marks = _HostMarks(lambda: machine.now) if kind == "host" else _DeviceMarks(machine.make_event)
    clock = StageClock(marks=marks)
    with pytest.raises(KeyError), clock.step(), clock.stage("forward"):
        machine.now += 5
        raise KeyError
    take_step(clock, machine)
    machine.passed_until = machine.now
    seconds, steps = clock.take()
    assert (steps, seconds["forward"], seconds["other"]) == (1, 6, 32)


def test_a_clock_without_a_device_measures_nothing_and_one_of_the_cpu_does() -> None:
    for clock, steps in ((StageClock(), 0), (StageClock(torch.device("cpu")), 1)):
        with clock.step(), clock.stage("forward"):
            pass
        assert clock.take()[1] == steps

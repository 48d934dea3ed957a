"""Stop signals, skipped steps and the spike rule, each by itself."""

from __future__ import annotations

import os
import signal
import statistics
from types import SimpleNamespace
from typing import Any

import pytest

from moepp.config import GuardConfig
from moepp.errors import TrainingError
from moepp.metrics.throughput import Throughput
from moepp.training import trainer as training
from moepp.training.guards import LossWatch, SkippedSteps, SpikeGuard, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stop_signal_is_remembered_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.received is number
    assert signal.getsignal(number) is before


def test_ctrl_c_interrupts_at_once_and_again_where_it_was_swallowed() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            stop.raise_interrupt()  # nothing yet
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    stop.raise_interrupt()
            assert stop.received is None  # nothing is saved
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            stop.raise_interrupt()
    finally:
        signal.signal(signal.SIGINT, before)


def test_skipped_steps_stop_the_run_only_in_a_row() -> None:
    guard = SkippedSteps(GuardConfig(max_skipped_steps=3))
    for step, skipped in enumerate([True, True, False, True, True], start=1):
        guard.record(skipped, step)
    assert (guard.total, guard.in_a_row) == (4, 2)
    with pytest.raises(
        TrainingError, match=r"3 steps in a row \(guard.max_skipped_steps\), up to step 6; lower optim.lr"
    ):
        guard.record(True, 6)


def test_counts_go_on_after_a_restart_and_a_spike_is_no_broken_step() -> None:
    guard = SkippedSteps(GuardConfig(max_skipped_steps=3), total=7, in_a_row=2)
    guard.count_spike()
    assert (guard.total, guard.in_a_row) == (8, 0)
    guard = SkippedSteps(GuardConfig(max_skipped_steps=3), total=7, in_a_row=2)
    with pytest.raises(TrainingError):
        guard.record(True, 11)


def test_spike_is_a_loss_beyond_sigma_of_a_full_window() -> None:
    losses = [4.0, 4.2, 3.9, 4.1]
    guard = SpikeGuard(GuardConfig(spike_sigma=3.0, spike_window=4))
    assert guard.is_on and not guard.is_spike(4.0) and not guard.is_spike(90.0), "the window is not full yet"
    guard = SpikeGuard(GuardConfig(spike_sigma=3.0, spike_window=4))
    assert not any(guard.is_spike(loss) for loss in losses)
    bound = statistics.mean(losses) + 3.0 * statistics.stdev(losses)
    assert guard.is_spike(bound + 1e-9)
    assert guard.history == losses, "a spike does not join the window"
    assert not guard.is_spike(bound - 1e-9)
    assert guard.history == [*losses[1:], bound - 1e-9]


def test_low_losses_are_no_spikes() -> None:
    guard = SpikeGuard(GuardConfig(spike_sigma=1.0, spike_window=2), history=[4.0, 4.1])
    assert not guard.is_spike(1.0)


def test_window_goes_on_after_a_restart() -> None:
    cfg = GuardConfig(spike_sigma=2.0, spike_window=3)
    whole, first = SpikeGuard(cfg), SpikeGuard(cfg)
    losses = [3.0, 3.1, 2.9, 3.05, 9.0, 2.95]
    expected = [whole.is_spike(loss) for loss in losses]
    found = [first.is_spike(loss) for loss in losses[:3]]
    second = SpikeGuard(cfg, first.history)
    assert found + [second.is_spike(loss) for loss in losses[3:]] == expected == [False] * 4 + [True, False]


def test_off_by_default() -> None:
    assert not SpikeGuard(GuardConfig()).is_on


def remarks(losses: list[float], vocab_size: int = 8192) -> list[int]:
    """Steps at which the loss is remarked upon."""
    watch = LossWatch(vocab_size, learning_rate=1e3)
    return [i for i, loss in enumerate(losses) if watch.remark(loss, i, is_last=i == len(losses) - 1)]


def test_run_that_diverges_is_remarked_upon_once_and_at_its_end():
    assert remarks([9.1, 8.0, 60.0, 700.0, 889403.0]) == [2, 4]
    assert remarks([9.1, 60.0, 7.0, 6.0]) == [1]
    assert remarks([889403.0]) == [0], "logged once, when all was over"
    assert remarks([5e5, 8e5, 9e5]) == [1, 2], "the first record is the mean of steps that have diverged already"
    assert remarks([3.0, 13.0, 14.0]) == [1, 2], "continued from a checkpoint"


def test_run_that_learns_is_not_remarked_upon():
    assert remarks([9.1, 9.4, 8.0, 7.0]) == []
    assert remarks([300.0, 9.0, 8.0, 7.0]) == [], "large initial weights"
    assert remarks([9.05]) == []


def test_remark_names_loss_step_and_remedy():
    text = LossWatch(8192, 1e3).remark(889403.0, 300, is_last=True)
    assert text == (
        "the loss is 889,403 at step 300, far above 9.011, which guessing gives: training has diverged; "
        "lower optim.lr=1000"
    )


def test_going_back_after_a_spike_is_no_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def takes(seconds: float, result: Any = None) -> Any:
        def act(*_: Any) -> Any:
            now[0] += seconds
            return result

        return act

    throughput = Throughput(1, clock=lambda: now[0])
    trainer: Any = training.Trainer.__new__(training.Trainer)
    checkpointer = SimpleNamespace(wait=takes(30.0), checkpoints=None)
    trainer.parts = SimpleNamespace(
        throughput=throughput, checkpointer=checkpointer, sinks=SimpleNamespace(rewind=takes(0.5))
    )
    trainer.cfg = SimpleNamespace(guard=GuardConfig(max_rewinds=1))
    trainer.stats, trainer.groups = SimpleNamespace(clear=takes(0.0)), None
    trainer.step, trainer.skipped_batches, trainer.rewinds = 4, 0, 0
    trainer.resume = takes(20.0)
    monkeypatch.setattr(training, "newest_checkpoint", takes(5.0, "step-2"))
    throughput.add(800)
    now[0] += 2.0
    trainer._rewind()
    assert now[0] == 57.5 and throughput.read(None)["throughput/tokens_per_second"] == 400

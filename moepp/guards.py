"""Watching over a run: stop signals, broken steps, loss spikes. Every decision is the same on every rank."""

from __future__ import annotations

import signal
import statistics
from collections import deque
from types import FrameType
from typing import Any

from moepp.config import GuardConfig
from moepp.errors import TrainingError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers SIGTERM or SIGUSR1 (what schedulers send before the time is up) instead of dying of it."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)


class SkippedSteps:
    """Counts steps without an update and gives up after too many broken ones in a row.

    Attributes:
        total: steps skipped over the whole run, loss spikes included.
        in_a_row: steps since the last one whose loss and gradient were finite.
    """

    def __init__(self, cfg: GuardConfig, total: int = 0, in_a_row: int = 0) -> None:
        self.total = total
        self.in_a_row = in_a_row
        self._limit = cfg.max_skipped_steps

    def record(self, skipped: bool, step: int) -> None:
        """Count one optimizer step.

        Raises:
            TrainingError: ``guard.max_skipped_steps`` steps in a row had a loss or a gradient that is not finite.
        """
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped
        if self.in_a_row >= self._limit:
            raise TrainingError(
                f"loss or gradient were not finite for {self.in_a_row} steps in a row (guard.max_skipped_steps), up to "
                f"step {step}; lower optim.lr, or continue from an earlier checkpoint with run.resume=PATH"
            )

    def count_spike(self) -> None:
        """Count a step whose update was left out because of its loss, which was finite."""
        self.total += 1
        self.in_a_row = 0


class SpikeGuard:
    """Flags a loss ``guard.spike_sigma`` standard deviations above the mean of the last ``guard.spike_window`` ones."""

    def __init__(self, cfg: GuardConfig, history: list[float] | None = None) -> None:
        self._sigma = cfg.spike_sigma
        self._window: deque[float] = deque(history or [], maxlen=cfg.spike_window)

    @property
    def is_on(self) -> bool:
        return self._sigma is not None

    @property
    def history(self) -> list[float]:
        """The losses in the window, to be restored after a restart."""
        return list(self._window)

    def is_spike(self, loss: float) -> bool:
        """Judge the mean loss of one step, finite. Spikes do not join the window; until it is full there are none."""
        assert self._sigma is not None and self._window.maxlen is not None
        if len(self._window) == self._window.maxlen:
            mean, deviation = statistics.fmean(self._window), statistics.stdev(self._window)
            if loss > mean + self._sigma * deviation:
                return True
        self._window.append(loss)
        return False

"""Watching over a run: stop signals, broken steps, loss spikes. Every decision is the same on every rank."""

from __future__ import annotations

import math
import signal
import statistics
from collections import deque
from types import FrameType
from typing import Any

from moepp.config import GuardConfig
from moepp.errors import TrainingError

FAR_ABOVE = 1.2  # times the first loss: no run that learns gets there
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers SIGTERM or SIGUSR1 (what schedulers send before the time is up) instead of dying of it.

    Ctrl-C raises KeyboardInterrupt at once, as ever, and is remembered too: libraries that catch every exception (DCP
    in a save) and callbacks of the interpreter may swallow it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._is_interrupted = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else ignored, as in the background
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._is_interrupted = True
        raise KeyboardInterrupt

    def raise_interrupt(self) -> None:
        """Raise again the KeyboardInterrupt of a Ctrl-C that has not ended the run.

        Raises:
            KeyboardInterrupt: there was one.
        """
        if self._is_interrupted:
            raise KeyboardInterrupt


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


class LossWatch:
    """Says so when the loss has risen far above where it began: a run that diverges goes on, but not without a word.

    A model that guesses uniformly has a loss of ln V, and one that has just been initialised is close to that.
    """

    def __init__(self, vocab_size: int, learning_rate: float) -> None:
        self._guessing = math.log(vocab_size)
        self._learning_rate = learning_rate
        self._limit: float | None = None
        self._has_warned = False

    def remark(self, loss: float, step: int, is_last: bool) -> str | None:
        """Return a warning for a logged loss: once when it is too high, and at the end if it still is."""
        is_first = self._limit is None
        if self._limit is None:
            self._limit = FAR_ABOVE * min(max(loss, self._guessing), 2 * self._guessing)
        if loss <= self._limit or (is_first and not is_last) or (self._has_warned and not is_last):
            return None
        self._has_warned = True
        return (
            f"the loss is {loss:,.6g} at step {step}, far above {self._guessing:.4g}, which guessing gives: training "
            f"{'has diverged' if is_last else 'diverges'}; lower optim.lr={self._learning_rate:g}"
        )


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

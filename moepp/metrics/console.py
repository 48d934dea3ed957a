"""Progress on the console: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

logger = logging.getLogger(__name__)

# metric -> how it is shown; the order of the line
_SHOWN = {
    "train/loss": "loss {:.4f}",
    "eval/loss": "eval loss {:.4f}",
    "train/grad_norm": "grad norm {:.3g}",
    "optim/lr": "lr {:.2e}",
    "routing/ffn_per_token": "FFN/token {:.3f}",
    "throughput/tokens_per_second": "{:,.0f} tokens/s",
    "throughput/mfu": "MFU {:.1%}",
}
# Perplexities follow from losses; shares of expert kinds by task are for files and charts.
_OWN_EVALUATION = re.compile(r"eval/(.+/(?!perplexity$|share_)(?!\w*_stderr)[^/]+)")
_LOSS_ON_A_SET = re.compile(r"eval/[\w-]{1,64}/loss")
_BAR_SHOWS = ("train/loss", "eval/loss", "throughput/tokens_per_second", "routing/ffn_per_token")


class LineSink:
    """Logs one line per record through the logger ``moepp.metrics.console``."""

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        to_console: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``to_console=False`` keeps the lines to the log file, for when a bar shows the progress."""
        self._total_steps = total_steps
        self._start_step = start_step
        self._extra = {"to_console": to_console}
        self._clock = clock
        self._start = clock()

    def log(self, record: Mapping[str, float], step: int, tokens: int) -> None:
        parts = [f"step {step}/{self._total_steps}", f"{tokens:,} tokens", *_format(record, _SHOWN)]
        parts += _own_evaluations(record)
        # Estimated over the whole run so far, so that evaluations and checkpoints are counted in.
        if step > self._start_step and step < self._total_steps:
            seconds_per_step = (self._clock() - self._start) / (step - self._start_step)
            parts.append(f"ETA {_duration(seconds_per_step * (self._total_steps - step))}")
        logger.info(" | ".join(parts), extra=self._extra)

    def close(self) -> None:
        """Do nothing: nothing is held back."""


class BarSink:
    """A progress bar over the optimizer steps with loss, tokens/s, FFN experts per token and the time left."""

    def __init__(self, total_steps: int, start_step: int = 0, stream: TextIO | None = None) -> None:
        """``stream``: where to draw; None: stderr."""
        from tqdm import tqdm

        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            file=stream if stream is not None else sys.stderr,
            desc="training",
            unit="step",
            dynamic_ncols=True,
        )
        self._shown: dict[str, float] = {}
        self._first_set = ""  # loss on a set of data.validation

    def log(self, record: Mapping[str, float], step: int, tokens: int) -> None:
        self._shown |= {name: record[name] for name in _BAR_SHOWS if name in record}
        sets = {name: value for name, value in record.items() if _LOSS_ON_A_SET.fullmatch(name)}
        self._first_set = next(iter(_own_evaluations(sets)), self._first_set)
        parts = _format(self._shown, _BAR_SHOWS)
        if self._first_set and "eval/loss" not in self._shown:
            parts.append(self._first_set)
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def _own_evaluations(record: Mapping[str, float]) -> list[str]:
    """Return what validation sets and benchmarks with names of their own say: all that some records hold."""
    names = (match for name in record if (match := _OWN_EVALUATION.fullmatch(name)))
    return [f"eval {match[1].replace('/', ' ')} {record[match[0]]:.4f}" for match in names]


def _format(record: Mapping[str, float], names: Mapping[str, str] | tuple[str, ...]) -> list[str]:
    return [_SHOWN[name].format(record[name]) for name in names if name in record]


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"

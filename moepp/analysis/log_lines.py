"""Warnings and errors at the ends of a run's logs, in the order of time."""

from __future__ import annotations

import calendar
import re
import time

from moepp.analysis.runs import Run
from moepp.io.untrusted import printable, read_part
from moepp.runs.directory import RunDir

RANK = re.compile(r"rank-([0-9]{1,9})")
ERROR = re.compile(r"\b(ERROR|CRITICAL)\b")
_SERIOUS = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b")
_TIME = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2})(?:,[0-9]{3})?(Z?) ")
_TAIL_BYTES = 200_000
_SHOWN = 4

Tails = tuple[list[tuple[float, str, str]], list[tuple[str, str]]]
"""(time, name of the log, line) of the newest warnings and errors, and (name, cause) of unreadable logs."""


def warnings_of(tails: Tails) -> list[str]:
    """Return the newest warnings and errors of all ranks' logs, oldest first, and which logs cannot be read."""
    lines, unreadable = tails
    newest = sorted(lines, key=lambda found: found[0])[-_SHOWN:]  # lines of one time stay as they are in their log
    found = [f"{rank}: {printable(line, 160)}" for _, rank, line in newest]
    return found + [f"{rank}: its log cannot be read: {why}" for rank, why in unreadable[:_SHOWN]]


def log_tails(run: Run) -> Tails:
    """Read the ends of all ranks' logs; one that vanishes meanwhile is in neither part."""
    found, unreadable = [], []
    for path in sorted(RunDir(run.path).log.glob("rank-*.txt")):
        if not RANK.fullmatch(path.stem):
            continue
        try:
            lines = read_part(path, _TAIL_BYTES, from_end=True).decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            continue
        except OSError as error:
            unreadable.append((path.stem, str(error.strerror)))
            continue
        when = 0.0
        for line in lines:
            when = seconds_of(line) or when  # further lines of a message have no time of their own
            if _SERIOUS.search(line):
                found.append((when, path.stem, line))
    return found, unreadable


def seconds_of(line: str) -> float | None:
    """Return when a line was logged, whole seconds since the epoch; None where it does not say so.

    Logs are in UTC and say so with a Z. Those of earlier versions are in their host's time zone, taken for this one's.
    """
    found = _TIME.match(line)
    if found is None:
        return None
    try:
        parsed = time.strptime(found[1], "%Y-%m-%d %H:%M:%S")
        return float(calendar.timegm(parsed)) if found[2] else time.mktime(parsed)
    except (ValueError, OverflowError):
        return None

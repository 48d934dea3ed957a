"""Whether a difference is more than the seeds' spread explains: what a caption may conclude."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SURE = 2.0  # standard errors that a difference must exceed to be called one


@dataclass(frozen=True)
class Estimate:
    """A number of a setting: the mean over its seeds.

    Attributes:
        label: the setting.
        value: the mean.
        spread: sample standard deviation over seeds; None of one seed.
        seeds: how many there are.
    """

    label: str
    value: float
    spread: float | None = None
    seeds: int = 1


def standard_error(a: Estimate, b: Estimate) -> float | None:
    """Return the standard error of a difference of two means; None where one of them has one seed."""
    if a.spread is None or b.spread is None:
        return None
    return math.sqrt(a.spread**2 / a.seeds + b.spread**2 / b.seeds)


def chance(a: Estimate, b: Estimate) -> float | None:
    """Return the largest difference of two means that the spread of their seeds explains; None if it is not known.

    That is the larger spread of the two, and twice the standard error of their difference if that is more.
    """
    error = standard_error(a, b)
    if a.spread is None or b.spread is None or error is None:
        return None
    return max(a.spread, b.spread, SURE * error)


def differ(a: Estimate, b: Estimate) -> bool | None:
    """Return whether the difference is more than chance; None if that is not known, for one of them has one seed.

    Within the spread of the one that has several seeds there is none, whatever the other's is.
    """
    difference, bound = abs(a.value - b.value), chance(a, b)
    if bound is not None:
        return difference > bound
    known = [one.spread for one in (a, b) if one.spread is not None]
    return False if known and difference <= known[0] else None


def verdict(a: Estimate, b: Estimate) -> str:
    """Return what may be said of the difference of two settings."""
    found, bound = differ(a, b), chance(a, b)
    if found is None:
        single = [one.label for one in (a, b) if one.spread is None]
        return f"{'one seed each' if len(single) == 2 else f'one seed of {single[0]}'}: spread unknown"
    if bound is None:
        [spread] = [one.spread for one in (a, b) if one.spread is not None]
        return f"no more than the seeds' spread, ±{spread:.3f}: no difference"
    if found:
        return f"more than the seeds' spread explains, {bound:.3f}"
    return f"no more than the seeds' spread explains, {bound:.3f}: no difference"


def undecided(best: Estimate, others: Sequence[Estimate]) -> list[str]:
    """Return the settings that are not told apart from the best one by their seeds' spread."""
    return [one.label for one in others if differ(best, one) is False]

"""Grids of parameters of which the default run takes a sample; the rest is slow, and in tests/dist exhaustive."""

from __future__ import annotations

import itertools
from typing import Any

import pytest


def pairwise(**values: Any) -> pytest.MarkDecorator:
    """Parametrize a test with every combination; those beyond a sample are marked slow.

    In the sample, each value of a parameter meets each value of every other one at least once: faults that a single
    value or two together bring about show up in it.
    """
    combinations = list(itertools.product(*values.values()))
    places = list(itertools.combinations(range(len(values)), 2)) or [(0, 0)]
    pairs = [{(i, j, str(row[i]), str(row[j])) for i, j in places} for row in combinations]
    open_pairs, sample = set().union(*pairs), set()
    while open_pairs:
        best = max(range(len(pairs)), key=lambda number: len(pairs[number] & open_pairs))
        sample.add(best)
        open_pairs -= pairs[best]
    cases = [
        pytest.param(*row, marks=[] if number in sample else [pytest.mark.slow])
        for number, row in enumerate(combinations)
    ]
    return pytest.mark.parametrize(",".join(values), cases)

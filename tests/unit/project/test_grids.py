"""The sample of a grid of parameters."""

from __future__ import annotations

import itertools

from tests.grids import pairwise


def test_the_sample_holds_every_pair_of_values_and_the_rest_is_marked_slow() -> None:
    values = {"a": [1, 2], "b": ["x", "y", "z"], "c": [None, True, False, 0.5]}
    _names, cases = pairwise(**values).args
    sample = [case.values for case in cases if not case.marks]
    assert sorted(map(str, (case.values for case in cases))) == sorted(map(str, itertools.product(*values.values())))
    assert len(sample) < len(cases) and all(case.marks[0].name == "slow" for case in cases if case.marks)
    for (i, first), (j, second) in itertools.combinations(enumerate(values.values()), 2):
        assert {(row[i], row[j]) for row in sample} == set(itertools.product(first, second))

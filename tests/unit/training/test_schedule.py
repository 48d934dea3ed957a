"""The learning rate as a function of the step."""

from __future__ import annotations

import itertools
import math

import pytest

from moepp.config import OptimConfig
from moepp.training.schedule import learning_rate, schedule_remarks
from tests.data_files import make_config


def rates(total: int, **changes: object) -> list[float]:
    optim = OptimConfig(**({"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4} | changes))  # type: ignore[arg-type]
    return [learning_rate(step, total, optim) for step in range(total)]


def test_warm_up_rises_by_equal_steps_and_reaches_the_peak_at_its_last_step():
    assert rates(20)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_cosine_falls_from_the_peak_to_the_minimum_at_the_last_step():
    values = rates(25)
    assert values[4] == 1.0 and values[-1] == pytest.approx(0.1)
    assert values[14] == pytest.approx(0.55)  # half-way
    assert values[9] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert all(later < earlier for earlier, later in itertools.pairwise(values[4:]))


def test_linear_falls_by_equal_steps():
    values = rates(14, schedule="linear")
    assert values[4:] == pytest.approx([1.0 - 0.1 * i for i in range(10)])


def test_constant_stays_at_the_peak():
    assert rates(12, schedule="constant")[4:] == [1.0] * 8


def test_without_warm_up_the_first_step_has_the_peak():
    for schedule in ("cosine", "linear", "constant"):
        assert rates(5, warmup_steps=0, schedule=schedule)[0] == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_steps_after_the_last_one_stay_at_the_minimum(schedule):
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=2, schedule=schedule)
    assert [learning_rate(step, 10, optim) for step in (10, 11, 500)] == pytest.approx([0.1] * 3)


def test_warm_up_longer_than_the_run_and_runs_of_one_step_work():
    assert rates(3, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])
    assert rates(1, warmup_steps=0) == [1.0]
    assert rates(5, warmup_steps=4)[-1] == 1.0


@pytest.mark.parametrize(
    ("changes", "step", "before", "remark"),
    [
        (
            {"train__steps": 300, "optim__warmup_steps": 2000},
            0,
            None,
            "ends at 7.5e-05 and never reaches optim.lr=0.0005",
        ),
        ({"train__steps": 300, "optim__warmup_steps": 299}, 0, None, "never falls to optim.min_lr=5e-05"),
        ({"train__steps": 300, "optim__warmup_steps": 30}, 100, 100, "train.steps was 100 and is 300"),
        ({"train__steps": 300, "optim__warmup_steps": 30, "profile__steps": [10, 200]}, 100, 300, "profile.steps [10]"),
        ({"train__steps": 300, "optim__warmup_steps": 30}, 100, 300, None),
        ({"train__steps": 300, "optim__warmup_steps": 298}, 0, None, None),
        ({"train__steps": 300, "optim__warmup_steps": 300, "optim__schedule": "constant"}, 0, None, None),
        ({"train__steps": 300, "optim__warmup_steps": 200}, 100, 100, None),
        ({"train__steps": 1, "optim__warmup_steps": 0}, 0, None, None),
    ],
)
def test_steps_that_are_hardly_meant_are_remarked(changes, step, before, remark):
    found = schedule_remarks(make_config(["text"], optim__lr=5e-4, **changes), step, before)
    assert (found == []) if remark is None else (len(found) == 1 and remark in found[0]), found

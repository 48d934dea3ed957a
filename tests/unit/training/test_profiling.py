"""Traces are written for the chosen steps and ranks alone."""

from __future__ import annotations

import json

import pytest
import torch

from moepp.config import validate
from moepp.config.schema import ProfileConfig
from moepp.errors import ConfigError
from moepp.training.profiling import StepProfiler
from tests.data_files import make_config


def test_chosen_steps_of_chosen_ranks_leave_a_trace(tmp_path):
    for rank in (0, 1):
        profiler = StepProfiler(ProfileConfig(steps=(2, 4), ranks=(1,)), tmp_path, rank)
        for step in range(1, 6):
            with profiler.step(step):
                torch.ones(8, 8) @ torch.ones(8, 8)
    written = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert written == ["step-00000002-rank-1.json", "step-00000004-rank-1.json"]
    events = json.loads((tmp_path / "profile" / written[0]).read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)


def test_a_step_that_fails_leaves_no_trace_and_its_own_error(tmp_path):
    profiler = StepProfiler(ProfileConfig(steps=(1,)), tmp_path, 0)
    with pytest.raises(ZeroDivisionError), profiler.step(1):
        raise ZeroDivisionError
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": [5]}, r"profile.steps=\[5\] names \[5\], beyond train.steps=4"),
        ({"steps": [1], "ranks": [0, 2]}, r"profile.ranks=\[0, 2\] names \[2\], beyond the last of 2 ranks"),
        ({"steps": [0]}, "profile.steps entry=0"),
    ],
)
def test_a_trace_that_would_never_be_written_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        cfg = make_config(["x"], **{f"profile__{key}": value for key, value in changes.items()})
        validate(cfg, 2)

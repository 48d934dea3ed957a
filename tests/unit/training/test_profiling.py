"""Traces are written for the chosen steps and ranks alone."""

from __future__ import annotations

import errno
import json
from pathlib import Path

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


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def torn(_: object, path: str) -> None:
    Path(path).write_text('{"a": ')


def torch_fails(*_: object) -> None:
    raise RuntimeError("cannot open trace.json")


@pytest.mark.parametrize(
    ("place", "fails", "reason"),
    [
        ("moepp.io.files.make_own_folder", full_disk, "No space left"),
        ("moepp.io.files.write_whole", full_disk, "No space left"),
        ("tempfile.mkdtemp", full_disk, "No space left"),
        ("torch.profiler.profile.export_chrome_trace", torch_fails, "cannot open trace.json"),
        (
            "torch.profiler.profile.export_chrome_trace",
            lambda _, path: Path(path).write_text('{"a": '),
            "torch wrote 6 bytes of it, and not its end",
        ),
        ("torch.profiler.profile.export_chrome_trace", lambda *_: None, "No such file"),
    ],
)
def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, caplog, place, fails, reason):
    profiler = StepProfiler(ProfileConfig(steps=(1, 2)), tmp_path, 0)
    done = []
    with monkeypatch.context() as patched:
        patched.setattr(place, fails)
        with profiler.step(1):
            done.append(1)
    assert done == [1] and len(caplog.messages) == 1 and reason in caplog.messages[0]
    assert "step 1 was profiled, but its trace is not kept; training goes on: " in caplog.messages[0]
    assert list(tmp_path.glob("profile/*")) == []
    if place == "tempfile.mkdtemp":
        with profiler.step(2):
            pass
        assert [path.name for path in tmp_path.glob("profile/*")] == ["step-00000002-rank-0.json"]


def test_what_a_killed_rank_left_of_a_trace_is_removed_by_its_next_start(tmp_path):
    for name in (".rank-0-abc", ".rank-1-abc", ".rank-10-abc"):
        (tmp_path / "profile" / name).mkdir(parents=True)
        (tmp_path / "profile" / name / "trace.json").write_text("{")
    StepProfiler(ProfileConfig(), tmp_path, 0)
    assert len(list(tmp_path.glob("profile/.*"))) == 3
    StepProfiler(ProfileConfig(steps=(1,), ranks=(1,)), tmp_path, 1)
    assert sorted(path.name for path in tmp_path.glob("profile/.*")) == [".rank-0-abc", ".rank-10-abc"]


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

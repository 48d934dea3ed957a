"""TensorBoard's event files hold every record once, also after a restart and a rewind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moepp.errors import ConfigError
from moepp.metrics.tensorboard import TensorBoardSink, require_tensorboard

pytest.importorskip("tensorboard")


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(name)]


def test_records_lie_at_their_tokens(tmp_path):
    sink = TensorBoardSink(tmp_path, tokens_per_step=64)
    sink.log({"train/loss": 4.5, "optim/lr": 0.25}, 10, 640)
    sink.log({"eval/loss": 4.25}, 10, 640)
    sink.log({"train/loss": 4.0}, 20, 1280)
    sink.close()
    assert scalars(tmp_path, "train/loss") == [(640, 4.5), (1280, 4.0)]
    assert scalars(tmp_path, "eval/loss") == [(640, 4.25)]
    assert scalars(tmp_path, "progress/step") == [(640, 10), (640, 10), (1280, 20)]


@pytest.mark.parametrize("restarted", [True, False])
def test_what_is_computed_again_is_shown_once(tmp_path, restarted):
    sink = TensorBoardSink(tmp_path, tokens_per_step=64)
    for step in (1, 2, 3):
        sink.log({"train/loss": float(step)}, step, 64 * step)
    if restarted:
        sink.close()
        sink = TensorBoardSink(tmp_path, tokens_per_step=64, start_step=1)
    else:
        sink.rewind(1)
    sink.log({"train/loss": 2.5}, 2, 128)
    sink.close()
    assert scalars(tmp_path, "train/loss") == [(64, 1.0), (128, 2.5)]


def test_a_missing_package_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'moepp\[tensorboard\]' or set it to false"):
        require_tensorboard()

"""What ``info.json`` of a checkpoint holds, for checkpoints made by hand."""

from __future__ import annotations

from typing import Any

from moepp.checkpoint import CheckpointInfo, RunState, SavedLayout


def make_info(
    step: int, tokens: int = 0, world_size: int = 1, config: dict[str, Any] | None = None, **layout: Any
) -> CheckpointInfo:
    """Information of a checkpoint after ``step`` steps."""
    plain = {"world_size": world_size, "expert": 1, "engine": "native", "zero_stage": 0, "precision": "fp32"}
    return CheckpointInfo(
        step, tokens, SavedLayout(**(plain | layout)), config or {}, {"torch": "2.13.0"}, RunState.fresh(seed=1)
    )

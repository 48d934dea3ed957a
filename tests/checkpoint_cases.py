"""What ``info.json`` of a checkpoint holds, for checkpoints made by hand."""

from __future__ import annotations

from typing import Any

from moepp.checkpoint.format import CheckpointInfo

RUN_STATE: dict[str, Any] = {
    "seed": 1,
    "next_batch": 0,
    "skipped_batches": 0,
    "rewinds": 0,
    "skipped_steps": 0,
    "skipped_in_a_row": 0,
    "recent_losses": [],
    "data": {},
    "wandb_run_id": None,
}


def make_info(
    step: int, tokens: int = 0, world_size: int = 1, config: dict[str, Any] | None = None, **layout: Any
) -> CheckpointInfo:
    """Information of a checkpoint after ``step`` steps."""
    plain = {"world_size": world_size, "expert": 1, "engine": "native", "zero_stage": 0, "precision": "fp32"}
    return CheckpointInfo(step, tokens, plain | layout, config or {}, {"torch": "2.13.0"}, dict(RUN_STATE))

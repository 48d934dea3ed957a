"""What is a pure function of the step: the learning rate, and what is due."""

from __future__ import annotations

import math

from moepp.config import OptimConfig


def is_due(step: int, interval: int) -> bool:
    """Return whether something that happens every ``interval`` steps (0: never) happens after ``step``."""
    return interval > 0 and step % interval == 0


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Return the learning rate of 0-based ``step``: linear warm-up to ``lr``, then the schedule to ``final_lr``."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(total_steps - 1 - optim.warmup_steps, 1)
    progress = min(progress, 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1 - progress
    return optim.final_lr + (optim.lr - optim.final_lr) * share

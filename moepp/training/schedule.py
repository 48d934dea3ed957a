"""What is a pure function of the step: the learning rate, and what is due."""

from __future__ import annotations

import math

from moepp.config import Config, OptimConfig


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


def schedule_remarks(cfg: Config, step: int, steps_before: int | None) -> list[str]:
    """Return the remarks about steps that are allowed but hardly meant.

    Args:
        step: from which the run goes on.
        steps_before: ``train.steps`` of the run when it got there; None: not known.
    """
    optim, steps = cfg.optim, cfg.train.steps
    remarks = []
    warmup = f"optim.warmup_steps={optim.warmup_steps} of train.steps={steps}"
    if optim.warmup_steps > steps:
        reached = learning_rate(steps - 1, steps, optim)
        remarks.append(f"{warmup}: the learning rate ends at {reached:.3g} and never reaches optim.lr={optim.lr:g}")
    elif optim.schedule != "constant" and 1 < steps <= optim.warmup_steps + 1:
        remarks.append(f"{warmup}: the learning rate never falls to optim.min_lr={optim.final_lr:g}")
    if step and steps_before is not None and steps_before != steps:
        before, now = learning_rate(step - 1, steps_before, optim), learning_rate(step, steps, optim)
        if now > 1.1 * before and step > optim.warmup_steps:
            remarks.append(
                f"train.steps was {steps_before} and is {steps}: at step {step} the learning rate goes up again, from "
                f"{before:.3g} to {now:.3g}"
            )
    past = [number for number in cfg.profile.steps if number <= step]
    if past:
        remarks.append(f"profile.steps {past}: the run goes on from step {step}, no trace of them is written")
    return remarks

"""Step times by stage, and how far apart the ranks are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moepp.distributed.stage_clock import STAGES, StageClock
from moepp.metrics.values import Value

_OWN_WORK = ("data", "forward", "backward", "optimizer")  # in the other stages a rank waits for others


def stage_values(clock: StageClock) -> dict[str, Value]:
    """Return this rank's seconds by stage since the last call, and the number of steps, for each rank."""
    seconds, steps = clock.take()
    return {
        "stages": Value.ranks(torch.tensor([*(seconds.get(name, 0.0) for name in STAGES), steps], dtype=torch.float64))
    }


def stage_metrics(reduced: Mapping[str, Tensor]) -> dict[str, float]:
    """Return seconds per step.

    - ``time/step``, ``time/<stage>``: mean over ranks and steps; stages that no rank has are left out.
    - ``time/<stage>_max_over_mean``: slowest rank over the mean; with several ranks alone.
    - ``time/slowest_rank``: which rank's own work took longest: data, forward, backward and optimizer.
    """
    table_PX = reduced["stages"]
    if not (table_PX[:, -1] > 0).all():
        return {}
    seconds_PX = table_PX[:, :-1] / table_PX[:, -1:]
    mean_X, most_X = seconds_PX.mean(dim=0), seconds_PX.amax(dim=0)
    found = {"time/step": float(mean_X.sum())}
    for name, mean, most in zip(STAGES, mean_X.tolist(), most_X.tolist(), strict=True):
        if mean > 0:
            found[f"time/{name}"] = mean
            if len(table_PX) > 1:
                found[f"time/{name}_max_over_mean"] = most / mean
    if len(table_PX) > 1:
        own = [STAGES.index(name) for name in _OWN_WORK]
        found["time/slowest_rank"] = float(seconds_PX[:, own].sum(dim=1).argmax())
    return found

"""What the trainer needs of an engine, and what the engines share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moepp.config import OptimConfig


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step, the same on every rank.

    Attributes:
        grad_norm: global gradient norm before clipping; every parameter counted once. Not finite if skipped.
        skipped: the gradient was not finite, so parameters and optimizer state were left alone.
    """

    grad_norm: float
    skipped: bool


class Engine(Protocol):
    """Owns the parameters' gradients, their reduction over ranks, and the optimizer."""

    model: nn.Module

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss; micro-batches and ranks are averaged."""
        ...

    def step(self, lr: float, update: bool = True) -> StepResult:
        """Reduce, clip and update after the last micro-batch; ``update=False`` only measures and discards."""
        ...

    def export_state(self) -> dict[str, dict[str, Any]]:
        """Local shards by parameter name: ``fp32``, and the optimizer's ``exp_avg``, ``exp_avg_sq``, ``step``."""
        ...

    def import_state(self, state: dict[str, dict[str, Any]]) -> None:
        """The inverse of :meth:`export_state`: local shards shaped like this rank's parameters."""
        ...


def make_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (fused) or plain SGD over parameter groups that carry their own ``weight_decay``."""
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def state_keys(optim: OptimConfig) -> tuple[str, ...]:
    """Optimizer state tensors kept per parameter."""
    return ("exp_avg", "exp_avg_sq") if optim.name == "adamw" else ()

"""What the trainer needs of an engine, and what the engines share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moepp.config import OptimConfig

Fetch = Callable[[str, dict[str, Tensor]], None]
"""Takes a parameter's name and buffers by state key, and fills the buffers in place."""


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step, the same on every rank.

    Attributes:
        grad_norm: global gradient norm before clipping; every parameter counted once.
        skipped: it was not finite, or no update was asked for, so parameters and optimizer state were left alone.
    """

    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class OwnPart:
    """What this rank's optimizer updates of one parameter, with its gradient after the sum over ranks.

    Attributes:
        name: of the parameter.
        gradient, weight: the same elements of both, before clipping and update; perhaps none.
        copies: ranks that have the same part.
    """

    name: str
    gradient: Tensor
    weight: Tensor
    copies: int


Watch = Callable[[Sequence[OwnPart], Tensor], None]
"""Looks at all that an optimizer is about to use; it may not keep it.

The tensor has the sum of the squares of each part's gradient, float64 [N]: the norm before clipping is made of it.
"""


class StateSource(Protocol):
    """What a checkpoint is written from: an engine, or weights that were never trained on."""

    model: nn.Module

    def read_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Return each parameter's ``fp32`` master and optimizer state, in one fixed order; every rank must exhaust it.

        Tensors are shaped like this rank's parameter (dense ones whole, FFN experts its own); ``step`` is a scalar,
        the number of updates. They are only valid until the next item.
        """
        ...


class Engine(StateSource, Protocol):
    """Owns the parameters' gradients, their reduction over ranks, and the optimizer."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss; micro-batches and ranks are averaged."""
        ...

    def step(self, lr: float, update: bool = True, watch: Watch | None = None) -> StepResult:
        """Reduce, clip and update after the last micro-batch; ``update=False`` only measures and discards.

        ``watch`` gets this rank's parts between reduction and clipping.
        """
        ...

    def write_state(self, fetch: Fetch) -> None:
        """Replace masters, optimizer state and model weights: ``fetch`` fills buffers like those of ``read_state``."""
        ...


class ScheduledEngine(Engine, Protocol):
    """An engine that takes gradients from whoever runs the backward passes, as a pipeline's schedule does.

    Attributes:
        loss_scale: what each micro-batch's mean loss has to be multiplied by before its backward.
    """

    loss_scale: float

    def begin_backward(self, layers: range) -> None:
        """Be told which layers the next backward goes through: those of one stage, for one micro-batch."""
        ...


def make_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (fused) or plain SGD over parameter groups that carry their own ``weight_decay``."""
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


ALL_KEYS = ("exp_avg", "exp_avg_sq", "step")


def state_keys(optim: OptimConfig) -> tuple[str, ...]:
    """Optimizer state tensors kept per parameter."""
    return ("exp_avg", "exp_avg_sq") if optim.name == "adamw" else ()


def read_plain_state(
    names: Sequence[str], masters: Sequence[Tensor], optimizer: torch.optim.Optimizer, optim: OptimConfig
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """:meth:`Engine.read_state` for a torch optimizer that holds whole parameters."""
    for name, master in zip(names, masters, strict=True):
        entry = optimizer_entry(master, optimizer, optim)
        yield name, {"fp32": master.detach()} | entry


@torch.no_grad()
def write_plain_state(
    names: Sequence[str],
    masters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    optim: OptimConfig,
    fetch: Fetch,
) -> None:
    """:meth:`Engine.write_state` for a torch optimizer that holds whole parameters; fills them in place."""
    for name, master in zip(names, masters, strict=True):
        entry = optimizer_entry(master, optimizer, optim)
        fetch(name, {"fp32": master.data} | entry)


def optimizer_entry(master: Tensor, optimizer: torch.optim.Optimizer, optim: OptimConfig) -> dict[str, Tensor]:
    """Return the optimizer's state of one tensor by key, created as the optimizer would where there is none yet."""
    entry = optimizer.state[master]
    if state_keys(optim) and not entry:
        entry["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        for key in state_keys(optim):
            entry[key] = torch.zeros_like(master, memory_format=torch.preserve_format)
    return {key: value for key, value in entry.items() if key in ALL_KEYS}

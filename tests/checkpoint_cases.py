"""A stand-in for an engine with known state, and saves of it on the ranks of a worker pool."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from moepp.checkpoint import Checkpointer, CheckpointInfo
from moepp.checkpoint.storage import TensorReader
from moepp.config import CheckpointConfig
from moepp.engine.engine import Engine, Fetch
from moepp.metrics.step_stats import StepStats
from moepp.parallel.groups import ParallelGroups, build_groups, new_cpu_group

Tensor = torch.Tensor
DENSE = {"embed": (64, 8), "norm": (8,), "layers.0.router.weight": (5, 8), "head": (64, 8)}
EXPERTS = {"layers.0.experts.gate_up_proj": (8, 12, 8), "layers.0.experts.down_proj": (8, 8, 6)}  # [E, ...]
KEYS = ("fp32", "exp_avg", "exp_avg_sq")


def value(name: str, key: str, shape: tuple[int, ...], step: int) -> Tensor:
    """The whole tensor that a run has after ``step``: another one for every name, key and step."""
    generator = torch.Generator().manual_seed(hash_of(f"{name} {key} {step}"))
    return torch.randn(shape, generator=generator)


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "little") % (2**31)


class FakeEngine:
    """Holds state as a real engine would: dense parameters whole, of the experts this rank's share."""

    def __init__(self, groups: ParallelGroups, step: int) -> None:
        self.groups = groups
        self.set_step(step)

    def set_step(self, step: int) -> None:
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, shape in (DENSE | EXPERTS).items():
            whole = {key: value(name, key, shape, step) for key in KEYS}
            if name in EXPERTS:
                size = shape[0] // self.groups.ep_size
                own = slice(self.groups.ep_rank * size, (self.groups.ep_rank + 1) * size)
                whole = {key: tensor[own].clone() for key, tensor in whole.items()}
            self.state[name] = whole | {"step": torch.tensor(float(step))}

    def read_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield from self.state.items()

    def write_state(self, fetch: Fetch) -> None:
        for name, buffers in self.state.items():
            fetch(name, buffers)


class Saving:
    """A checkpointer and an engine on one rank."""

    def __init__(self, folder: str, ep_size: int = 1, **cfg: Any) -> None:
        self.groups = build_groups(ep_size, torch.device("cpu"))
        self.folder = Path(folder)
        self.checkpointer = Checkpointer(CheckpointConfig(**cfg), self.groups, self.folder, new_cpu_group())
        self.stats = StepStats((0,), 8, 2)

    def save(self, step: int, background: bool = False) -> list[str]:
        """The problems of one save, waited for."""
        engine = FakeEngine(self.groups, step)
        info = CheckpointInfo(step, 10 * step, {"world_size": self.groups.world_size}, {}, {}, {})
        self.checkpointer.save(cast(Engine, engine), self.stats, info, background)
        engine.set_step(10**6)  # training goes on: the save must not see it
        self.checkpointer.wait()
        return self.checkpointer.reports[-1].problems


def names(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def check_content(checkpoint: Path, step: int) -> None:
    """Every value is what the whole model had, under a name that tells no layout."""
    reader = TensorReader(checkpoint)
    expected = {f"{name}/{key}": value(name, key, shape, step) for name, shape in DENSE.items() for key in KEYS}
    for name, shape in EXPERTS.items():
        for key in KEYS:
            expected |= {f"{name}.{e}/{key}": expert for e, expert in enumerate(value(name, key, shape, step))}
    found = {key: torch.full_like(tensor, torch.nan) for key, tensor in expected.items()}
    reader.fill(found)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    of_ranks = {key for key in reader.shapes if key.startswith("rank-")}
    steps = {key for key in reader.shapes if key.endswith("/step")}
    assert reader.shapes.keys() == expected.keys() | of_ranks | steps
    for key in steps:
        reader.fill({key: (number := torch.zeros(1))})
        assert number == step


@contextlib.contextmanager
def replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)

"""What measuring costs: the same training step without a recorder, between two records, and with a record.

All of them train one model in one process, taking turns, with the trainer and the sinks of a run: metrics.jsonl,
routing.jsonl, which gets a line with every record here, and the log. W&B gets its records in a thread of its own, whose
cost is a table of its own.

Shapes: B sequences, S tokens per sequence.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from moepp.bench import layouts, wandb_cost
from moepp.bench.processes import run_processes
from moepp.bench.tables import Record
from moepp.bench.timing import clock_for
from moepp.config import Config, make_plan
from moepp.data import Corpora, Vocabulary
from moepp.distributed import comm
from moepp.distributed.groups import Layout, build_groups
from moepp.distributed.stage_clock import StageClock
from moepp.io.temporary import temporary_folder
from moepp.metrics.jsonl import read_records
from moepp.metrics.sinks import open_sinks
from moepp.metrics.throughput import Throughput
from moepp.ops import choose_kernels
from moepp.training.build import build_engine, build_model
from moepp.training.parts import Parts
from moepp.training.trainer import Trainer

NOTHING, BETWEEN = "nothing", "between records"
RECORDS = {"brief": "record, brief", "detailed": "record, detailed"}
_NEVER = 10**9  # steps


@dataclass(frozen=True)
class Options:
    """The model of ``moepp bench layouts``, whose sequences go through it together.

    Attributes:
        log_interval: steps for each record, of which the last column speaks.
    """

    shape: layouts.Options
    device: torch.device
    rounds: int = 20
    kernels: str = "auto"
    log_interval: int = 10

    def config(self, routing: str, log_interval: int) -> Config:
        """Return a run's configuration."""
        cfg = self.shape.config({})
        train = replace(cfg.train, steps=_NEVER, micro_batch_size=None, log_interval=log_interval)
        wandb = replace(cfg.logging.wandb, mode="disabled")
        logging = replace(cfg.logging, routing=routing, routing_interval=log_interval, wandb=wandb, progress=False)
        return replace(cfg, train=train, logging=logging)


class _RandomData:
    """Batches of random tokens, made once."""

    def __init__(self, cfg: Config) -> None:
        shape, generator = (cfg.train.global_batch_size, cfg.data.seq_len), torch.Generator().manual_seed(0)
        draws = [torch.randint(cfg.model.vocab_size, shape, generator=generator) for _ in range(8)]
        self._batches_8BS = [(ids_BS, ids_BS.roll(-1, dims=1)) for ids_BS in draws]

    def train_batch(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        return self._batches_8BS[step % 8]

    def eval_batch(self, index: int, micro_step: int, name: str | None = None) -> tuple[Tensor, Tensor]:
        return self._batches_8BS[index % 8]

    def epochs(self, batches: int) -> float:
        return batches / 8


class _NoStats:
    """Takes the statistics of a run that measures nothing."""

    def ignore(self, *_: object) -> None:
        """Do nothing."""

    add_micro_batch = commit = discard = ignore


class _NoRecorder:
    """Stands for the recorder of such a run; its clock is off."""

    watch = None

    def __init__(self, clock: StageClock) -> None:
        self.clock = clock

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        yield

    @contextmanager
    def observation(self) -> Iterator[None]:
        yield

    def commit(self) -> None:
        """Do nothing."""

    def is_logged(self, step: int) -> bool:
        return False


def run(options: Options) -> dict[str, list[Record]]:
    """Return a row for each way of measuring, compared within every round, and what W&B costs for a record."""
    [tables] = run_processes(_compare, 1, options, device_type=options.device.type)
    return tables


def _compare(_rank: int, _world_size: int, options: Options) -> dict[str, list[Record]]:
    choose_kernels(options.kernels, options.device)  # a process that was started for it has chosen none
    with temporary_folder("moepp-bench-") as folder:
        steps = make_steps(options, folder)
        times: dict[str, list[float]] = {name: [] for name in steps}
        clock = clock_for(options.device, torch.get_num_threads())
        names = list(steps)
        for turn in range(2 + options.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # none always follows the same one
                start = clock()
                steps[name]()
                if turn >= 2:
                    times[name].append(clock() - start)
        records = {name: read_records(Path(folder, way, "metrics.jsonl"))[-1] for name, way in RECORDS.items()}
    return {"metrics": _rows(times, options.log_interval), "wandb": wandb_cost.run(records, 10 * options.rounds)}


def make_steps(options: Options, folder: Path) -> dict[str, Callable[[], None]]:
    """Return what takes one step for each way of measuring, all with one model; needs a process group of one.

    The files of a way's records are in the directory of its name in ``folder``.
    """
    cfg = options.config("detailed", _NEVER)
    groups, plan = build_groups(Layout(1), options.device), make_plan(cfg, 1)
    comm_stats = comm.CommStats(clock=StageClock(options.device))
    model = build_model(cfg, groups, comm_stats)
    engine, data = build_engine(cfg, plan, model, groups, comm_stats.clock), _RandomData(cfg)
    model.train()

    def make(name: str, routing: str, log_interval: int) -> Callable[[], None]:
        cfg = options.config(routing, log_interval)
        place = folder / name
        place.mkdir()
        parts = Parts(
            cfg=cfg,
            plan=plan,
            groups=groups,
            model=model,
            engine=engine,
            corpora=Corpora((), Vocabulary(None, None, None)),
            data=data,
            comm_stats=comm_stats,
            sinks=open_sinks(place, cfg, 0),
            throughput=Throughput(1),
            checkpointer=cast(Any, None),  # nothing is saved
            versions={},
        )
        trainer = Trainer(parts)

        if name == NOTHING:
            trainer.recorder = cast(Any, _NoRecorder(comm_stats.clock))
            trainer.stats = cast(Any, _NoStats())

        def step() -> None:
            comm_stats.clock.is_on = name != NOTHING
            result = trainer.train_step()
            if trainer.recorder.is_logged(trainer.step):
                trainer.log(result)

        return step

    steps = {name: make(name, "detailed", _NEVER) for name in (NOTHING, BETWEEN)}
    return steps | {name: make(name, routing, 1) for routing, name in RECORDS.items()}


def _rows(times: dict[str, list[float]], log_interval: int) -> list[Record]:
    """Return medians; ratios are taken within each round, so that a machine that changes its pace is fair."""
    ratios = {
        name: statistics.median(own / bare for own, bare in zip(found, times[NOTHING], strict=True))
        for name, found in times.items()
    }
    rows: list[Record] = []
    for name, found in times.items():
        row: Record = {"measured": name, "step ms": statistics.median(found) * 1e3, "x nothing": ratios[name]}
        if name in RECORDS.values():
            mean = ((log_interval - 1) * ratios[BETWEEN] + ratios[name]) / log_interval
            row[f"overhead, a record every {log_interval} steps, %"] = 100 * (mean - 1)
        rows.append(row)
    return rows

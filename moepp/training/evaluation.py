"""Evaluation while training: held-out batches and benchmarks, after the steps at which they are due.

A checkpoint is written before, so that nothing which goes wrong here costs training. A signal ends an evaluation
between two forward passes; the next start evaluates what then has no record.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moepp.config import Config
from moepp.distributed import comm, waits
from moepp.distributed.device import to_device
from moepp.errors import EvaluationStopped
from moepp.metrics.jsonl import read_records
from moepp.training.memory import enough_memory
from moepp.training.parts import Parts
from moepp.training.runner import Runner
from moepp.training.schedule import is_due

BATCHES, TASKS = "held-out batches", "benchmarks"
_LARGEST_EXPONENT = math.log(sys.float_info.max)


def due_after(step: int, cfg: Config) -> tuple[str, ...]:
    """Return what is evaluated after ``step``: :data:`BATCHES`, :data:`TASKS`, both or nothing."""
    is_last = step == cfg.train.steps
    asked = {
        BATCHES: cfg.train.eval_batches > 0 and (is_last or is_due(step, cfg.train.eval_interval)),
        TASKS: bool(cfg.eval.tasks) and (is_last or is_due(step, cfg.eval.interval)),
    }
    return tuple(what for what, is_asked in asked.items() if step > 0 and is_asked)


def lacking_after(step: int, cfg: Config, run_path: Path) -> tuple[str, ...]:
    """Return what is due after ``step`` and has no record in ``metrics.jsonl``: an earlier start ended; collective.

    Raises:
        RunError: that is no metrics file.
    """
    return comm.broadcast_object(comm.on_first_rank(lambda: _without_record(step, cfg, run_path / "metrics.jsonl")))


def _without_record(step: int, cfg: Config, metrics: Path) -> tuple[str, ...]:
    due = due_after(step, cfg)
    records = read_records(metrics) if due and metrics.exists() else []
    if not records:  # a run that begins with the checkpoint of another one
        return ()
    names = {name for record in records if record["step"] == step for name in record}
    of_batches = {_prefix(name) + key for name in validation_sets(cfg) for key in ("/loss", "/perplexity")}
    of_tasks = {name for name in names if name.startswith("eval/")} - of_batches
    recorded = {BATCHES: bool(names & of_batches), TASKS: bool(of_tasks)}
    return tuple(what for what in due if not recorded[what])


def validation_sets(cfg: Config) -> list[str | None]:
    """Return the names of the sets of ``data.validation``; None is the validation part of ``data.paths``."""
    return [*([None] if cfg.data.evaluates_split else []), *cfg.data.validation]


class Evaluator:
    """Evaluates the model of a run and writes the records.

    Args:
        parts: of the run.
        runner: the way through the model.
    """

    def __init__(self, parts: Parts, runner: Runner) -> None:
        self.parts, self.cfg, self.groups = parts, parts.cfg, parts.groups
        self._runner = runner

    def run(
        self, what: Collection[str], step: int, tokens: int, eod_id: int | None, must_stop: Callable[[], bool]
    ) -> bool:
        """Evaluate and record; collective.

        Args:
            what: as :func:`due_after` returns it.
            step: optimizer steps done.
            tokens: training tokens seen.
            eod_id: ends the documents of the data; None: not known.
            must_stop: asked on every rank now and then: has a signal come here?

        Returns:
            Whether it was ended by a signal on any rank; what was not finished then has no record.

        Raises:
            TrainingError: memory does not suffice.
        """
        remedy = "lower train.micro_batch_size or eval.batch_size, or use more ranks"
        try:
            with enough_memory(f"the evaluation after step {step}", self.groups.rank, remedy):
                if BATCHES in what:
                    self.validate(step, tokens, must_stop)
                if TASKS in what:
                    self._run_tasks(step, tokens, eod_id, must_stop)
        except EvaluationStopped:
            return True
        return False

    def validate(self, step: int, tokens: int, must_stop: Callable[[], bool] | None = None) -> None:
        """Record the mean cross-entropy in nats per token of each validation set, and its perplexity.

        Over ``train.eval_batches`` held-out global batches.

        Raises:
            EvaluationStopped: a signal has come.
        """
        names = validation_sets(self.cfg)
        sums_N2 = torch.zeros(len(names), 2, dtype=torch.float64, device=self.groups.device)  # loss, tokens
        with self.mode():
            for row, name in enumerate(names):
                for index in range(self.cfg.train.eval_batches):
                    if must_stop is not None and comm.agree_on_flag(must_stop(), self.groups.world):
                        raise EvaluationStopped("a signal has come")
                    sums_N2[row] += self._runner.evaluate(self._batches(index, name))
        sums = zip(names, comm.all_reduce_sum(sums_N2, self.groups.world).tolist(), strict=True)
        record: dict[str, float] = {}
        for name, (ce_sum, num_tokens) in sums:
            loss = ce_sum / num_tokens if num_tokens else math.nan
            record |= {f"{_prefix(name)}/loss": loss, f"{_prefix(name)}/perplexity": _perplexity(loss)}
        self.parts.sinks.log(record, step, tokens)

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Eval mode (dropless routing), outside the measured training time."""
        self.parts.model.eval()
        try:
            with self.parts.throughput.paused():
                yield
        finally:
            self.parts.model.train()

    def _batches(self, index: int, name: str | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        device, read = self.groups.device, self.parts.data.eval_batch
        micro_batches = (read(index, step, name) for step in range(self.parts.plan.accumulation_steps))
        return [(to_device(inputs_BS, device), to_device(labels_BS, device)) for inputs_BS, labels_BS in micro_batches]

    def _run_tasks(self, step: int, tokens: int, eod_id: int | None, must_stop: Callable[[], bool]) -> None:
        """Run the benchmarks of ``eval.tasks`` on the sharded model.

        Rank 0 reads documents and builds prompts while the others wait: not within the limit of a training step.
        """
        assert self.parts.evaluate_tasks is not None
        with self.mode(), waits.unlimited_waits(self.cfg.parallel.timeout_seconds):
            record = self.parts.evaluate_tasks(self.parts.model, eod_id, must_stop)
        self.parts.sinks.log(record, step, tokens)


def _prefix(name: str | None) -> str:
    return "eval" if name is None else f"eval/{name}"


def _perplexity(loss: float) -> float:
    """Return e to the cross-entropy; infinite where no number is that large."""
    return math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf

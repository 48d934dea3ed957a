"""The training loop: batches in, optimizer steps, metric records and checkpoints out.

Shapes: B sequences of this rank's micro-batch, S tokens each, L MoE layers, E experts of every kind.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

from torch import Tensor

from moepp.checkpoint import (
    CheckpointInfo,
    RunState,
    SavedLayout,
    load_training_state,
    newest_checkpoint,
    read_info,
)
from moepp.config import to_dict
from moepp.data.reader import BatchReader
from moepp.distributed import comm
from moepp.distributed.device import to_device
from moepp.engine.engine import ScheduledEngine, StepResult
from moepp.errors import CheckpointError, Preempted, TrainingError
from moepp.moe.layer import updates_after_step
from moepp.training.evaluation import Evaluator, due_after, lacking_after
from moepp.training.guards import SkippedSteps, SpikeGuard, StopRequest
from moepp.training.memory import enough_memory
from moepp.training.parts import Parts
from moepp.training.profiling import StepProfiler
from moepp.training.recorder import Recorder
from moepp.training.runner import Runner, WholeModelRunner
from moepp.training.schedule import is_due, learning_rate

logger = logging.getLogger(__name__)

T = TypeVar("T")
_REMEDY = "lower train.micro_batch_size or data.seq_len, set train.recompute=true, or use more ranks"


class Trainer:
    """Runs optimizer steps up to ``cfg.train.steps``, from the beginning or from a checkpoint."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.cfg = parts.cfg
        self.plan = parts.plan
        self.groups = parts.groups
        self.model = parts.model
        self.engine = parts.engine
        self.step = 0  # optimizer steps done
        self.skipped_batches = 0  # global batches left out by rewinds: step s trains on batch s + skipped_batches
        self.rewinds = 0
        self.recorder = Recorder(parts)
        self.stats = self.recorder.stats
        self.runner = make_runner(parts)
        self.evaluator = Evaluator(parts, self.runner)
        self.skipped_steps = SkippedSteps(parts.cfg.guard)
        self.spikes = SpikeGuard(parts.cfg.guard)
        self.vocabulary = parts.corpora.vocabulary
        self.batches = BatchReader(parts.data, parts.plan, parts.groups.device)

    @property
    def tokens(self) -> int:
        """Training tokens seen so far, over all ranks."""
        return self.step * self.plan.tokens_per_step

    def resume(self, checkpoint: Path) -> None:
        """Continue from a verified checkpoint of this run, saved in any layout; later ones are archived."""
        info = read_info(checkpoint)
        if None not in (info.eod_id, self.vocabulary.eod_id) and info.eod_id != self.vocabulary.eod_id:
            logger.warning(  # weights that were imported: a run of its own data is refused before this
                "the data end their documents with token %d, those of the imported weights ended with token %d",
                self.vocabulary.eod_id,
                info.eod_id,
            )
        self.vocabulary = replace(
            self.vocabulary,
            eod_id=_known(self.vocabulary.eod_id, info.eod_id),
            tokenizer_sha256=_known(self.vocabulary.tokenizer_sha256, info.tokenizer_sha256),
        )
        load_training_state(checkpoint, self.engine, self.stats, self.groups, info.layout.world_size)
        self.step = info.step
        state = info.run_state
        self.skipped_batches, self.rewinds = state.skipped_batches, state.rewinds
        self.skipped_steps = SkippedSteps(self.cfg.guard, state.skipped_steps, state.skipped_in_a_row)
        self.spikes = SpikeGuard(self.cfg.guard, state.recent_losses)
        self.parts.checkpointer.archive_after(self.step)

    def fit(self, stop: StopRequest) -> None:
        """Train to the last step, evaluating, logging and saving on the way.

        Raises:
            Preempted: a signal asked any rank to stop; the state is saved.
            KeyboardInterrupt: Ctrl-C; nothing is saved.
            TrainingError: a guard gave up, or memory did not suffice.
            CheckpointError: training is done, but its last state could not be saved.
        """
        train = self.cfg.train
        run_dir = self.parts.checkpointer.checkpoints.parent
        profiler = StepProfiler(self.cfg.profile, run_dir, self.groups.rank)
        self.model.train()
        self.parts.throughput.begin()
        with closing(self.batches):
            if self._evaluate(lacking_after(self.step, self.cfg, run_dir), stop):
                self._log_preemption(stop)
            while self.step < train.steps:
                stop.raise_interrupt()
                step = self.step
                with profiler.step(step + 1), enough_memory(f"step {step + 1}", self.groups.rank, _REMEDY):
                    result = self.train_step()
                if self.step <= step:
                    continue  # rewound to a step whose records and checkpoint exist already
                if self.recorder.is_logged(self.step):
                    self.log(result)
                self._save_and_evaluate(stop)
        self.parts.checkpointer.close()
        if problems := self._problems_of_the_last_save():
            raise CheckpointError(
                f"training is done, but its last state could not be saved: {'; '.join(problems)}; remove the cause and "
                "start the same command again: it continues from the newest checkpoint"
            )

    def _save_and_evaluate(self, stop: StopRequest) -> None:
        """Do what is due after a step.

        Saving comes first, so that an evaluation that fails, or that nobody has time for, costs no training.

        Raises:
            Preempted: a signal asked any rank to stop; the state is saved.
        """
        is_last, due = self.step == self.cfg.train.steps, due_after(self.step, self.cfg)
        must_stop = self._anyone_must_stop(stop)
        saves = is_last or must_stop or is_due(self.step, self.cfg.checkpoint.interval)
        if saves:
            with self.parts.throughput.paused():
                self.save(background=False if must_stop or is_last else None)
        if due and not must_stop:
            must_stop = self._evaluate(due, stop)
            if must_stop and not saves:
                self.save(background=False)
        if must_stop and (due or not is_last):
            self._log_preemption(stop)

    def _evaluate(self, what: Collection[str], stop: StopRequest) -> bool:
        """Evaluate; returns whether a signal ended it."""
        if not what:
            return False
        return self.evaluator.run(
            what, self.step, self.tokens, self.vocabulary.eod_id, lambda: stop.received is not None
        )

    def train_step(self) -> StepResult:
        """Take one optimizer step over the global batch; a rewind may follow and lower :attr:`step`."""
        recorder, clock = self.recorder, self.recorder.clock
        batch = self.step + self.skipped_batches
        has_next = self.step + 1 < self.cfg.train.steps
        with recorder.step(self.step + 1):
            with clock.stage("data"):
                batches = [self.to_device(in_host_memory) for in_host_memory in self.batches.read(batch, has_next)]
            share_LE = self._global_selection_share(batches)
            with recorder.observation():
                loss_sums = self.runner.train(batches, share_LE, self.stats)
            with clock.stage("reduction"):
                ce_sum, aux_sum = self.sum_over_ranks(loss_sums).tolist()
            is_finite = math.isfinite(ce_sum + aux_sum)
            is_spike = is_finite and self.spikes.is_on and self.spikes.is_spike(ce_sum / self.plan.tokens_per_step)
            update = is_finite and not is_spike
            result = self.engine.step(self._learning_rate(self.step), update, recorder.watch)
            if not result.skipped:
                self._update_parts()
        self.step += 1
        self._settle(result, is_spike, "loss" if not is_finite else "gradient")
        return result

    def _settle(self, result: StepResult, is_spike: bool, broken: str) -> None:
        """Commit the step's statistics, or say why the step did not count."""
        if not result.skipped:
            self.recorder.commit()
            self.skipped_steps.record(False, self.step)
            return
        self.stats.discard()
        if not is_spike:
            logger.warning("step %d skipped: the %s is not finite", self.step, broken)
            self.skipped_steps.record(True, self.step)
            return
        logger.warning("step %d: loss spike, update skipped", self.step)
        self.skipped_steps.count_spike()
        if self.cfg.guard.spike_action == "rewind":
            self._rewind()

    def _update_parts(self) -> None:
        """Tell the routers and expert kinds that want it how often experts were chosen in this step, by all ranks."""
        layers = self.model.moe_layers
        # A stage without MoE layers takes part in the sum that the others need.
        if updates_after_step(self.cfg.model.moe) or any(layer.parts_updated_after_step() for layer in layers):
            load_LE = self.sum_over_ranks(self.stats.step_load())
            for row, layer in zip(self.model.moe_rows, layers, strict=True):
                layer.after_optimizer_step(load_LE[row])

    def _rewind(self) -> None:
        """Go back to the newest checkpoint and leave out the batches since, the spike's among them."""
        with self.parts.throughput.paused():  # what is read and waited for is no training
            self._go_back()

    def _go_back(self) -> None:
        self.parts.checkpointer.wait()
        spike_step, spike_batch, rewinds = self.step, self.step - 1 + self.skipped_batches, self.rewinds + 1
        checkpoint = newest_checkpoint(self.parts.checkpointer.checkpoints, self.groups)
        if checkpoint is None:
            raise CheckpointError(
                f"loss spike at step {spike_step} and guard.spike_action=rewind, but there is no checkpoint yet; "
                "set checkpoint.interval, or guard.spike_action=skip"
            )
        if rewinds > self.cfg.guard.max_rewinds:
            raise TrainingError(
                f"loss spike at step {spike_step} after {self.rewinds} rewinds (guard.max_rewinds); lower optim.lr or "
                "raise guard.spike_sigma"
            )
        self.stats.clear()
        self.resume(checkpoint)
        self.rewinds = rewinds
        self.skipped_batches = spike_batch + 1 - self.step
        self.parts.sinks.rewind(self.step, self.skipped_batches)
        logger.warning("rewound to step %d; batches up to %d are left out", self.step, spike_batch)

    def log(self, result: StepResult) -> None:
        """Reduce the interval's statistics over ranks and write one record."""
        batches = self.step + self.skipped_batches
        measured = {
            "train/grad_norm": result.grad_norm,
            "train/skipped_steps": self.skipped_steps.total,
            "optim/lr": self._learning_rate(max(self.step - 1, 0)),
            "data/sequences": batches * self.cfg.train.global_batch_size,
            "data/epoch": self.parts.data.epochs(batches),
        }
        self.recorder.log(measured, self.step, self.tokens)

    def save(self, background: bool | None = None) -> None:
        """Write a checkpoint of the present state."""
        info = CheckpointInfo(
            step=self.step,
            tokens=self.tokens,
            layout=SavedLayout.of(self.cfg, self.plan),
            config=to_dict(self.cfg),
            versions=self.parts.versions,
            run_state=RunState(
                seed=self.cfg.run.seed,
                next_batch=self.step + self.skipped_batches,
                skipped_batches=self.skipped_batches,
                rewinds=self.rewinds,
                skipped_steps=self.skipped_steps.total,
                skipped_in_a_row=self.skipped_steps.in_a_row,
                recent_losses=self.spikes.history,
                data=self.parts.corpora.identity,
                wandb_run_id=self.parts.sinks.wandb_run_id,
            ),
            eod_id=self.vocabulary.eod_id,
            tokenizer_sha256=self.vocabulary.tokenizer_sha256,
        )
        self.parts.sinks.sync()  # after a power failure the records reach as far as the checkpoint
        self.parts.checkpointer.save(self.engine, self.stats, info, background)

    def _global_selection_share(self, batches: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        """f_i of each MoE layer over the whole global batch, [L, E]; ``None`` where the layers count it themselves.

        With several micro-batches the choices of the later ones are not known when the first is back-propagated, so
        they are counted in a forward pass of their own.
        """
        moe = self.cfg.model.moe
        if moe.balance_loss_scope != "global_batch" or not moe.balance_loss_weight or len(batches) == 1:
            return None
        with self.recorder.clock.stage("forward"):
            return (self.sum_over_ranks(self.runner.count_choices(batches)) / self.plan.tokens_per_step).float()

    def _anyone_must_stop(self, stop: StopRequest) -> bool:
        """Return whether any rank got a stop signal; the answer is the same on every rank."""
        return bool(comm.agree_on_flag(stop.received is not None, self.groups.world))

    def _log_preemption(self, stop: StopRequest) -> None:
        self.parts.checkpointer.close()
        problems = self._problems_of_the_last_save()
        state = "its state could NOT be saved" if problems else "its state is saved"
        name = stop.received.name if stop.received is not None else "a signal on another rank"
        raise Preempted(f"stopped by {name} after step {self.step}; {state}; run.resume=auto continues it")

    def _problems_of_the_last_save(self) -> list[str]:
        reports = self.parts.checkpointer.reports
        return reports[-1].problems if reports else []

    def _learning_rate(self, step: int) -> float:
        return learning_rate(step, self.cfg.train.steps, self.cfg.optim)

    def to_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return to_device(batch[0], self.groups.device), to_device(batch[1], self.groups.device)

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return comm.all_reduce_sum(tensor, self.groups.world)


def make_runner(parts: Parts) -> Runner:
    """Return the way through the model that the layout asks for."""
    if parts.groups.pp_size == 1:
        return WholeModelRunner(parts.model, parts.engine, parts.comm_stats.clock)
    from moepp.training.pipeline import PipelineRunner  # imports torch's pipelining

    engine = cast(ScheduledEngine, parts.engine)  # the rules of the configuration allow no other
    return PipelineRunner(parts.model, engine, parts.groups, parts.cfg, parts.plan, parts.comm_stats)


def _known(now: T | None, before: T | None) -> T | None:
    """Return the data's value today, or the one that the checkpoint recorded."""
    return before if now is None else now

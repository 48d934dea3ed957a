"""Training through a pipeline of stages, scheduled by ``torch.distributed.pipelining``.

Shapes: n micro-batches, B sequences in each, S tokens, s the part of them that this rank holds, T = B·s, D width,
L MoE layers of the model, E experts of every kind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from moepp.config import Config, RunPlan
from moepp.distributed.comm import CommStats
from moepp.distributed.device import to_device
from moepp.distributed.groups import ParallelGroups
from moepp.distributed.stage_clock import StageClock
from moepp.engine.engine import ScheduledEngine
from moepp.metrics.step_stats import StepStats
from moepp.model.precision import DTYPES
from moepp.model.stage import Stage, StageResult
from moepp.model.transformer import Transformer
from moepp.training.runner import Batch

# It reports an error, with all arguments, which is then raised here.
logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)


class _TimedStage(PipelineStage):
    """Says when it computes; the rest of the schedule's time it waits for others."""

    clock = StageClock()
    begin_backward: Callable[[], None]

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.stage("forward"):
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        self.begin_backward()
        with self.clock.stage("backward"):
            return super().backward_one_chunk(*args, **kwargs)


class PipelineRunner:
    """A :class:`moepp.training.runner.Runner` over the stages of a pipeline.

    Every rank reads the same micro-batches as its peers in the other stages. Gradients are the same bits as without a
    pipeline: each parameter's are added in the order of micro-batches.

    Args:
        model: this rank's part of it.
        engine: takes the gradients; its loss_scale is applied here.
        groups: of the run.
        cfg: the run's configuration.
        plan: stages and micro-batches.
        comm_stats: where the bytes sent are counted.
    """

    def __init__(
        self,
        model: Transformer,
        engine: ScheduledEngine,
        groups: ParallelGroups,
        cfg: Config,
        plan: RunPlan,
        comm_stats: CommStats,
    ) -> None:
        self._model = model
        self._engine = engine
        self._groups = groups
        self._num_micro_batches = plan.accumulation_steps
        self._comm_stats = comm_stats
        own = groups.layout.stages_of(groups.rank, cfg.parallel.pipeline_chunks)
        self._stages = {index: Stage(model, plan.stage_layers[index], engine.loss_scale) for index in own}
        self._num_stages = len(plan.stage_layers)
        tokens = cfg.data.seq_len // groups.layout.replica_size
        self._shape = (plan.micro_batch_size, tokens)
        self._dtype = DTYPES[cfg.train.precision]  # an engine may keep the parameters in another
        self._has_chunks = cfg.parallel.pipeline_chunks > 1
        self._train = self._make_schedule(_take_loss)
        # One of its own: torch would make all receive buffers anew at every change between training and evaluation.
        self._forward: Any = None

    def train(self, batches: Sequence[Batch], selection_share_LE: Tensor | None, stats: StepStats) -> Tensor:
        results = self._run(self._train, batches, selection_share_LE, with_labels=True)
        loss_sums = torch.zeros(2, dtype=torch.float64, device=self._groups.device)
        for parts in results:
            layers = [layer for part in parts for layer in part.stats]
            ce_sum, num_tokens, aux_loss = (_total(parts, name) for name in ("ce_sum", "num_tokens", "aux_loss"))
            stats.add_micro_batch(layers, ce_sum, num_tokens)
            loss_sums += torch.stack((ce_sum, aux_loss)).to(loss_sums)
        return loss_sums

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        sums = torch.zeros(2, dtype=torch.float64, device=self._groups.device)
        for parts in self._run(self._forward_schedule(), batches, None, with_labels=True):
            sums += torch.stack((_total(parts, "ce_sum"), _total(parts, "num_tokens"))).to(sums)
        return sums

    @torch.no_grad()
    def count_choices(self, batches: Sequence[Batch]) -> Tensor:
        cfg = self._model.cfg
        shape = (len(cfg.moe_layers), cfg.moe.num_experts)
        counts_LE = torch.zeros(shape, dtype=torch.float64, device=self._groups.device)
        rows = to_device(torch.tensor(self._model.moe_rows, dtype=torch.int64), self._groups.device)
        for parts in self._run(self._forward_schedule(), batches, None, with_labels=False):
            loads = [layer.load_E for part in parts for layer in part.stats]
            if loads:
                counts_LE.index_add_(0, rows, torch.stack(loads).to(counts_LE))  # not [list]: that waits for its copy
        return counts_LE

    def _run(
        self, schedule: Any, batches: Sequence[Batch], selection_share_LE: Tensor | None, with_labels: bool
    ) -> list[list[StageResult]]:
        """Run all micro-batches; returns what each of this rank's stages found, by micro-batch."""
        assert len(batches) == self._num_micro_batches
        input_ids_NS = torch.cat([input_ids_BS for input_ids_BS, _ in batches])
        labels_NS = torch.cat([labels_BS for _, labels_BS in batches]) if with_labels else None
        for stage in self._stages.values():
            stage.results, stage.selection_share_LE = [], selection_share_LE
        is_first, is_last = 0 in self._stages, self._num_stages - 1 in self._stages
        try:
            with self._comm_stats.clock.stage("pipeline"):
                schedule.step(
                    *([input_ids_NS] if is_first else []),
                    target=input_ids_NS if is_last else None,  # asked for, not used: stages compute the loss
                    input_ids_BS=input_ids_NS,
                    labels_BS=labels_NS,
                    return_outputs=False,
                )
        except RuntimeError as error:
            cause = cause_of(error)
            if cause is error:
                raise
            raise cause from None
        self._count_bytes(with_backward=schedule is self._train)
        return [list(parts) for parts in zip(*(stage.results for stage in self._stages.values()), strict=True)]

    def _forward_schedule(self) -> Any:
        if self._forward is None:
            self._forward = self._make_schedule(None)
        return self._forward

    def _make_schedule(self, loss: Callable[..., Tensor] | None) -> Any:
        """Return a schedule of torch's: of forwards alone without a loss."""
        keywords: dict[str, Any] = {"n_microbatches": self._num_micro_batches, "loss_fn": loss, "scale_grads": False}
        stages = [self._make_stage(index, stage) for index, stage in self._stages.items()]
        if self._has_chunks:
            return ScheduleInterleaved1F1B(stages, **keywords)  # pyright: ignore[reportArgumentType]
        return (Schedule1F1B if loss is not None else ScheduleGPipe)(stages[0], **keywords)

    def _make_stage(self, index: int, stage: Stage) -> PipelineStage:
        ids = torch.empty(self._shape, dtype=torch.int64, device="meta")
        takes = (ids,) if stage.is_first else self._crossing(stage.receives_logits)
        loss = (torch.empty((), requires_grad=True, device="meta"),)
        gives = loss if stage.is_last else self._crossing(stage.sends_logits)
        made = _TimedStage(
            stage,
            index,
            self._num_stages,
            self._groups.device,
            input_args=takes,
            output_args=gives,
            group=self._groups.pp,
        )
        made.clock = self._comm_stats.clock
        made.begin_backward = partial(self._engine.begin_backward, stage.layers)
        return made

    def _crossing(self, with_logits: bool) -> tuple[Tensor, ...]:
        """Shapes of what crosses a border of stages."""
        cfg = self._model.cfg
        batch, tokens = self._shape
        hidden = torch.empty(batch, tokens, cfg.hidden_size, dtype=self._dtype, device="meta", requires_grad=True)
        if not with_logits:
            return (hidden,)
        return hidden, torch.empty(batch * tokens, cfg.moe.num_experts, device="meta", requires_grad=True)

    def _count_bytes(self, with_backward: bool) -> None:
        for stage in self._stages.values():
            borders = [] if stage.is_last else [stage.sends_logits]
            borders += [stage.receives_logits] if with_backward and not stage.is_first else []
            for with_logits in borders:
                per_micro_batch = sum(tensor.numel() * tensor.element_size() for tensor in self._crossing(with_logits))
                self._comm_stats.pipeline_bytes += self._num_micro_batches * per_micro_batch


def _take_loss(outputs: Any, target: Tensor) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _total(parts: Sequence[StageResult], name: str) -> Tensor:
    """Sum over the stages of a rank."""
    return torch.stack([getattr(part, name) for part in parts]).sum()


def cause_of(error: BaseException) -> BaseException:
    """Return what went wrong inside a stage, instead of torch's account of its arguments."""
    while error.__cause__ is not None and "failed to run" in str(error).lower():
        error = error.__cause__
    return error

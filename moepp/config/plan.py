"""Numbers that follow from the configuration and the number of ranks, derived once per run and handed down."""

from __future__ import annotations

from dataclasses import dataclass

from moepp.config.schema import Config
from moepp.config.stages import split_layers


@dataclass(frozen=True)
class RunPlan:
    """How a run splits its work; made by :func:`moepp.config.validate`.

    Attributes:
        world_size: ranks.
        data_size: replicas, which work on different sequences at the same time.
        micro_batch_size: sequences per replica and forward pass.
        accumulation_steps: micro-batches per replica and optimizer step.
        tokens_per_step: training tokens of an optimizer step, over all ranks.
        train_batches: global batches that the run can ask for, those that rewinds may leave out included.
        zero_stage: the ZeRO stage in force: the asked one, or the engine's default.
        stage_layers: layers of each pipeline stage; all of them in one without a pipeline.
    """

    world_size: int
    data_size: int
    micro_batch_size: int
    accumulation_steps: int
    tokens_per_step: int
    train_batches: int
    zero_stage: int
    stage_layers: tuple[range, ...]


def make_plan(cfg: Config, world_size: int) -> RunPlan:
    """Derive the plan; it holds only for a configuration that :func:`moepp.config.validate` accepts."""
    total, micro_batch_size = cfg.train.global_batch_size, cfg.train.micro_batch_size
    parallel = cfg.parallel
    data_size = max(world_size // (parallel.pipeline * parallel.context * parallel.tensor), 1)
    if micro_batch_size is None:
        micro_batch_size = max(total // data_size, 1) if parallel.pipeline == 1 else 1
    zero_stage = parallel.zero_stage
    if zero_stage is None:
        zero_stage = {"native": 0, "deepspeed": 1, "fsdp": 3}[cfg.engine.name]
    return RunPlan(
        world_size=world_size,
        data_size=data_size,
        micro_batch_size=micro_batch_size,
        accumulation_steps=total // (micro_batch_size * data_size),
        tokens_per_step=total * cfg.data.seq_len,
        train_batches=cfg.train.steps + _spare_batches(cfg),
        zero_stage=zero_stage,
        stage_layers=split_layers(
            cfg.model.num_layers, parallel.pipeline * parallel.pipeline_chunks, parallel.pipeline_layers
        ),
    )


def _spare_batches(cfg: Config) -> int:
    """Return how many global batches rewinds may skip and still leave enough for ``train.steps``."""
    if cfg.guard.spike_sigma is None or cfg.guard.spike_action != "rewind":
        return 0
    # A rewind goes back to the newest checkpoint; twice the interval if that one is damaged.
    return cfg.guard.max_rewinds * 2 * max(cfg.checkpoint.interval, 1)

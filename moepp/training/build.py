"""From a configuration to the parts of a run, in the order that finds mistakes before anything expensive."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from moepp import ops
from moepp.analysis.images import routing_images
from moepp.checkpoint import Checkpointer, CheckpointInfo
from moepp.config import Config, RunPlan, split_layers
from moepp.data import Corpora, Tokenizer, build_data
from moepp.distributed import comm
from moepp.distributed.groups import Layout, ParallelGroups, new_cpu_group
from moepp.distributed.sequence import SequenceParallel
from moepp.distributed.stage_clock import StageClock
from moepp.engine.engine import Engine
from moepp.errors import ConfigError
from moepp.interop import hf, official, upcycle
from moepp.io.untrusted import printable
from moepp.metrics.sinks import SinkGroup, open_sinks
from moepp.metrics.throughput import Throughput, peak_flops_per_second
from moepp.model.accounting import count_parameters
from moepp.model.compiled import compile_dense_parts, require_compiler
from moepp.model.init import init_parameters
from moepp.model.part import ModelPart
from moepp.model.precision import DTYPES
from moepp.model.transformer import Transformer
from moepp.moe import ExpertParallel
from moepp.runs.directory import RunDir
from moepp.training.memory import explained_memory
from moepp.training.parts import Evaluation, Parts

logger = logging.getLogger(__name__)


def device_name(device: torch.device) -> str:
    """Return the accelerator's name as its vendor gives it, or the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}"


def build_model(
    cfg: Config, groups: ParallelGroups, comm_stats: comm.CommStats, document_end: int | None = None
) -> Transformer:
    """Return the model on this rank's device, with weights that depend on the seed and the names alone.

    ``document_end``: id of the token that ends documents, where attention stays within them.

    Raises:
        ConfigError: it does not fit into memory.
    """
    with _enough_memory(cfg, groups.device), torch.device("meta"):
        model = Transformer(
            cfg.model,
            ExpertParallel(groups.ep, groups.stage, comm_stats, cfg.parallel.exchange_chunks),
            SequenceParallel(groups.tp, groups.cp, groups.replica, cfg.parallel.context_method, comm_stats),
            document_end,
            part=_part(cfg, groups.layout, groups.rank),
        ).to(DTYPES[cfg.train.precision])  # first: memory of float32 is never needed
    with _enough_memory(cfg, groups.device):
        model.to_empty(device=groups.device)
    init_parameters(model, cfg.run.seed, groups.ep_rank, groups.ep_size)
    model.set_recompute(cfg.train.recompute)
    moe, dtype = cfg.model.moe, DTYPES[cfg.train.precision]
    if cfg.model.moe_layers and moe.num_ffn_experts:
        sizes = (cfg.model.hidden_size, moe.ffn_hidden_size, moe.expert_chunk_rows)
        logger.info("FFN experts: %s", ops.expert_products(groups.device, dtype, *sizes))
    return model


def _part(cfg: Config, layout: Layout, rank: int) -> ModelPart:
    """Return what this rank holds of the model."""
    if layout.pipeline == 1:  # a command that needs no pipeline to read a run's model
        return ModelPart.whole(cfg.model.num_layers)
    chunks = cfg.parallel.pipeline_chunks
    stage_layers = split_layers(cfg.model.num_layers, layout.pipeline * chunks, cfg.parallel.pipeline_layers)
    return ModelPart.of_stages(stage_layers, layout.stages_of(rank, chunks))


def check_initial_weights(cfg: Config) -> None:
    """Refuse ``init.path`` if it is not what ``init.format`` says or does not fit the model; reads no weights.

    Raises:
        CheckpointError: lists what is wrong.
    """
    if cfg.init.path is not None:
        checks = {"official": official.check_folder, "moepp": hf.check_folder, "dense": upcycle.check_folder}
        checks[cfg.init.format](cfg.init.path, cfg.model)


def load_initial_weights(cfg: Config, model: Transformer, groups: ParallelGroups) -> None:
    """Replace fresh weights by those of ``init.path``, if there is one; each rank reads its own experts only."""
    if cfg.init.path is None:
        return
    if cfg.init.format == "dense":
        upcycle.load_into(model, cfg.init.path, cfg.init, cfg.run.seed, groups.ep_rank, groups.ep_size)
    else:
        source = official if cfg.init.format == "official" else hf
        source.load_into(model, cfg.init.path, groups.ep_rank, groups.ep_size)


def _start_from(cfg: Config, model: Transformer, groups: ParallelGroups) -> None:
    """Load the initial weights, and say if attention crosses documents from here on and did not in their training."""
    load_initial_weights(cfg, model, groups)
    if cfg.init.path is None or cfg.init.format != "moepp" or cfg.data.document_attention or groups.rank != 0:
        return
    if hf.read_document_end(cfg.init.path) is not None:
        logger.warning(
            "in the training of init.path=%s attention stayed within documents, and here it crosses them; set "
            "data.document_attention=true to go on as before",
            printable(cfg.init.path),
        )


def build_engine(
    cfg: Config, plan: RunPlan, model: Transformer, groups: ParallelGroups, clock: StageClock | None = None
) -> Engine:
    """Return the engine that ``engine.name`` asks for; ``clock`` measures what it does.

    Raises:
        ConfigError: its state does not fit into memory.
    """
    sizes = plan.accumulation_steps, plan.micro_batch_size, plan.zero_stage
    with _enough_memory(cfg, groups.device):
        if cfg.engine.name == "native":
            from moepp.engine.native import NativeEngine

            return NativeEngine(model, groups, cfg.optim, plan.accumulation_steps, plan.zero_stage, clock=clock)
        if cfg.engine.name == "fsdp":
            from moepp.engine.fsdp import FSDPEngine

            return FSDPEngine(model, groups, cfg.optim, plan.accumulation_steps, clock)
        from moepp.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, groups, cfg.optim, *sizes, cfg.engine, clock)


def build_parts(
    cfg: Config,
    plan: RunPlan,
    corpora: Corpora,
    groups: ParallelGroups,
    run_dir: RunDir,
    start: CheckpointInfo | None,
    versions: dict[str, Any],
    check_claim: Callable[[], None],
) -> Parts:
    """Return everything that :class:`moepp.training.trainer.Trainer` needs; collective.

    Args:
        cfg: the run's configuration.
        plan: what follows from it for this number of ranks.
        corpora: the run's data.
        groups: process groups of the run.
        run_dir: the run's directory, claimed by rank 0.
        start: of the checkpoint that the run continues from; None: it starts fresh.
        versions: package versions, for the checkpoints.
        check_claim: raises RunError where the directory is not the run's any more; does nothing on other ranks.
    """
    ops.choose_kernels(cfg.runtime.kernels, groups.device)
    if cfg.runtime.compile:
        comm.run_together(lambda: require_compiler(groups.device))
    start_step = start.step if start is not None else 0
    starts_fresh = start_step == 0
    if starts_fresh:
        comm.run_together(lambda: check_initial_weights(cfg))
    cache_dir = cfg.data.cache_dir or str(run_dir.path / "data-cache")
    data = build_data(cfg, plan, corpora, groups.data_rank, cache_dir)
    comm_stats = comm.CommStats(clock=StageClock(groups.device))
    document_end = corpora.vocabulary.eod_id if cfg.data.document_attention else None
    model = build_model(cfg, groups, comm_stats, document_end)
    if starts_fresh:
        comm.run_together(lambda: _start_from(cfg, model, groups))
    if cfg.runtime.compile:
        compile_dense_parts(model)
    engine = build_engine(cfg, plan, model, groups, comm_stats.clock)
    peak = peak_flops_per_second(device_name(groups.device), cfg.train.precision)
    throughput = Throughput(groups.world_size, peak)
    checkpointer = Checkpointer(cfg.checkpoint, groups, run_dir.checkpoints, new_cpu_group(), check_claim)
    draw = routing_images if cfg.logging.routing_interval else None
    offset = start.run_state.skipped_batches if start is not None else 0
    sinks = comm.on_first_rank(lambda: open_sinks(run_dir.path, cfg, start_step, offset, check_claim, draw))
    return Parts(
        cfg=cfg,
        plan=plan,
        groups=groups,
        model=model,
        engine=engine,
        corpora=corpora,
        data=data,
        comm_stats=comm_stats,
        sinks=sinks if sinks is not None else SinkGroup(),
        throughput=throughput,
        checkpointer=checkpointer,
        versions=versions,
        evaluate_tasks=task_evaluation(cfg, groups) if cfg.eval.tasks else None,
    )


def _enough_memory(cfg: Config, device: torch.device) -> AbstractContextManager[None]:
    """Turn an allocation that fails into one line about the model.

    Raises:
        ConfigError: within it, said by this rank.
    """

    def explain(reason: str) -> ConfigError:
        remedy = "lower model.vocab_size, model.hidden_size or others, or use more ranks"
        if cfg.engine.name == "fsdp":
            remedy = (
                "engine=fsdp starts with all weights that a rank has before they are shared, and more data-parallel "
                "ranks do not lower them; raise parallel.expert or parallel.pipeline, or lower model.hidden_size or "
                "others"
            )
        return ConfigError(
            f"the model's {count_parameters(cfg.model).total:,} parameters with their optimizer do not fit into the "
            f"memory of a rank's {device.type} ({reason}); {remedy}: `moepp plan` tells what each of them holds"
        )

    return explained_memory(explain)


def task_evaluation(cfg: Config, groups: ParallelGroups) -> Evaluation:
    """Return the benchmarks of ``eval.tasks``."""
    from moepp.evaluation.evaluate import evaluate_tasks  # imports lm-evaluation-harness

    path, settings = cfg.data.tokenizer, cfg.eval
    assert path is not None  # validated

    def evaluate(model: Transformer, eod_id: int | None, must_stop: Callable[[], bool]) -> dict[str, float]:
        tokenizer = Tokenizer(path, eod_id=eod_id)
        return evaluate_tasks(
            model, tokenizer, settings.tasks, groups, settings.data, settings.limit, settings.batch_size, must_stop
        )

    return evaluate

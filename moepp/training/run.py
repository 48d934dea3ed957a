"""One training run from configuration to last step: check, claim the directory, build, train, report."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moepp.checkpoint import CheckpointInfo, choose_checkpoint, continues_same_data, read_info
from moepp.config import Config, RunPlan, to_dict, validate
from moepp.data import Corpora, check_data, vocabulary_remarks
from moepp.distributed import comm, waits
from moepp.distributed.agreement import find_differences
from moepp.distributed.groups import (
    LaunchEnvironment,
    Layout,
    ParallelGroups,
    build_groups,
    init_process_group,
    pick_device,
    read_launch_environment,
)
from moepp.distributed.peers import PeerWatch
from moepp.distributed.session import watched
from moepp.engine.deepspeed import require_accelerator
from moepp.errors import DataError, MoeppError
from moepp.metrics.logs import close_logging, setup_logging
from moepp.metrics.sinks import require_sinks
from moepp.model.accounting import count_parameters, parts_without_flops
from moepp.model.precision import DTYPES
from moepp.runs.directory import RunClaim, RunDir
from moepp.runs.environment import describe_environment
from moepp.training.build import build_parts, device_name
from moepp.training.evaluation import lacking_after
from moepp.training.guards import StopRequest
from moepp.training.rank_facts import file_facts, processor_facts, start_facts
from moepp.training.samples import lacks_samples, write_samples
from moepp.training.schedule import schedule_remarks
from moepp.training.token_tables import write_token_tables
from moepp.training.trainer import Trainer

logger = logging.getLogger("moepp.training.run")

AFTER_LOSS = "look for that rank's own error, then start again: the run continues from its newest checkpoint"
LOCK_WAIT_SECONDS = 5.0  # a launcher may restart a run while its predecessor is still exiting


def run_training(cfg: Config) -> None:
    """Train as ``cfg`` says, on as many processes as the launcher started.

    Raises:
        MoeppError: anything a user can cause, the same on every rank, before training starts.
        PeerError: another rank was lost; the message names it.
    """
    launch = read_launch_environment()
    plan = validate(cfg, launch.world_size)
    shared = cfg.runtime.backend == "gloo"
    device = pick_device(launch.local_rank, cfg.runtime.device, launch.local_size, shared)
    if cfg.engine.name == "deepspeed":
        require_accelerator(device)
    elif cfg.engine.name == "fsdp":
        from moepp.engine.fsdp import require_fsdp  # imports torch's FSDP2

        require_fsdp()
    facts = start_facts(cfg, device)
    store = init_process_group(launch, device, cfg.parallel.timeout_seconds, facts, cfg.runtime.backend)
    if launch.rank > 0 and launch.local_rank == 0:  # the first of its host, whose log would be empty
        print(_introduce_rank(launch), flush=True)
    try:
        with watched(store, launch, device, cfg.parallel.heartbeat_seconds, AFTER_LOSS, _log_to_file) as watch:
            _run(cfg, plan, build_groups(Layout.of(cfg.parallel, launch.world_size), device), watch)
    finally:
        close_logging()


def _run(cfg: Config, plan: RunPlan, groups: ParallelGroups, watch: PeerWatch) -> None:
    """Check what can be checked, then train in the run's directory."""
    waits.limit_waits(waits.PATIENCE_SECONDS)
    comm.on_first_rank(lambda: require_sinks(cfg.logging))
    corpora = comm.run_together(lambda: check_data(cfg))
    _compare_ranks(cfg, groups)
    if cfg.eval.tasks:
        _check_tasks(cfg, groups)
    remark, remarked_here = find_differences(processor_facts(groups.device, DTYPES[cfg.train.precision]), groups.world)
    environment = describe_environment(device_name(groups.device), groups.world_size)
    claim = comm.on_first_rank(lambda: _claim(cfg, corpora, environment))
    try:
        run_dir = RunDir(Path(comm.broadcast_object(str(claim.run_dir.path) if claim else None)))
        comm.run_together(lambda: setup_logging(run_dir.path, groups.rank))
        logger.info("%s", _introduce_rank(groups), extra={"to_console": False})
        if remark and remarked_here:
            logger.warning("ranks differ in what may change the last bits of results: %s", remark)
        with StopRequest() as stop:
            _train(
                cfg,
                plan,
                corpora,
                groups,
                run_dir,
                environment,
                stop,
                claim.check if claim is not None else lambda: None,
                watch,
            )
    except MoeppError as error:
        _log_to_file(error)
        raise
    finally:
        if claim is not None:
            claim.release()


def _compare_ranks(cfg: Config, groups: ParallelGroups) -> None:
    """Refuse files that are not the same on every rank: each host may have a copy of its own."""
    facts = comm.run_together(lambda: file_facts(cfg))
    told, said_here = find_differences(facts, groups.world)
    if told:
        error = DataError(f"{told}; copy the same files to every host")
        error.said_here = said_here
        raise error


def _introduce_rank(launch: LaunchEnvironment | ParallelGroups) -> str:
    return f"rank {launch.rank} of {launch.world_size} on {socket.gethostname()}"


def _log_to_file(error: MoeppError) -> None:
    """Leave the reason in log/rank-*.txt; train.py prints it."""
    logger.error("%s", error, extra={"to_console": False})


def _check_tasks(cfg: Config, groups: ParallelGroups) -> None:
    from moepp.evaluation.names import harness_tasks_folder

    comm.run_together(harness_tasks_folder)  # is lm-evaluation-harness installed?
    from moepp.evaluation.evaluate import check_tasks

    check_tasks(cfg.eval.tasks, cfg.eval.data, groups)


def _claim(cfg: Config, corpora: Corpora, environment: dict[str, Any]) -> RunClaim:
    same_data = continues_same_data(cfg, RunDir(Path(cfg.run.path).expanduser()).checkpoints, corpora.differences)
    return RunDir.claim(cfg.run.path, to_dict(cfg), environment, cfg.run.resume, LOCK_WAIT_SECONDS, same_data=same_data)


def _introduce(cfg: Config, plan: RunPlan, groups: ParallelGroups) -> None:
    """Say what is about to be trained, and on what."""
    counts = count_parameters(cfg.model)
    logger.info(
        "%s parameters (%.0f%% in FFN experts), %s, %d rank%s, %s, %s, ZeRO %d; training to step %d",
        f"{counts.total:,}",
        100 * counts.ffn_experts / counts.total,
        cfg.train.precision,
        groups.world_size,
        "s" if groups.world_size > 1 else "",
        _sizes(groups.layout),
        cfg.engine.name,
        plan.zero_stage,
        cfg.train.steps,
    )
    if unknown := parts_without_flops(cfg.model):
        logger.info("throughput/mfu is left out: no flops_per_token() of %s", ", ".join(unknown))


def _sizes(layout: Layout) -> str:
    """Return the sizes of a layout that are in use, as "PP 2, EP 4"."""
    sizes = {"PP": layout.pipeline, "TP": layout.tensor, "CP": layout.context}
    return ", ".join([f"{name} {size}" for name, size in sizes.items() if size > 1] + [f"EP {layout.expert}"])


def _train(
    cfg: Config,
    plan: RunPlan,
    corpora: Corpora,
    groups: ParallelGroups,
    run_dir: RunDir,
    environment: dict[str, Any],
    stop: StopRequest,
    check_claim: Callable[[], None],
    watch: PeerWatch,
) -> None:
    logger.info("preparing data and model in %s", run_dir.path)
    checkpoint = choose_checkpoint(cfg, run_dir.checkpoints, groups, corpora.differences)
    start = read_info(checkpoint) if checkpoint is not None else None
    is_done = False
    if start is not None and start.step >= cfg.train.steps:
        is_at_its_end = start.step == cfg.train.steps and cfg.run.resume == "auto"
        is_done = not (is_at_its_end and lacking_after(start.step, cfg, run_dir.path))
        if is_done and not (is_at_its_end and lacks_samples(cfg, run_dir.path)):
            logger.info("nothing to do: %s is at step %d; raise train.steps to go on", run_dir.path, start.step)
            return
    with watch.busy():
        parts = build_parts(cfg, plan, corpora, groups, run_dir, start, environment["packages"], check_claim)
    _introduce(cfg, plan, groups)
    for remark in [*vocabulary_remarks(cfg, corpora.vocabulary), *_schedule_remarks(cfg, start)]:
        logger.warning("%s", remark)
    with parts.sinks:
        trainer = Trainer(parts)
        if checkpoint is not None:
            trainer.resume(checkpoint)
        if not is_done:
            _fit(trainer, stop)
            write_token_tables(trainer, run_dir.path)
        comm.run_together(parts.sinks.close)
    if cfg.train.samples:
        write_samples(parts, run_dir.path, trainer.vocabulary.eod_id)
    logger.info("finished step %d; everything is in %s", trainer.step, run_dir.path)


def _schedule_remarks(cfg: Config, start: CheckpointInfo | None) -> list[str]:
    if start is None:
        return schedule_remarks(cfg, 0, None)
    train = start.config.get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return schedule_remarks(cfg, start.step, steps if isinstance(steps, int) else None)


def _fit(trainer: Trainer, stop: StopRequest) -> None:
    try:
        with waits.limited_waits(trainer.cfg.parallel.timeout_seconds):
            trainer.fit(stop)
    except MoeppError:
        trainer.parts.checkpointer.close()  # a save in flight is finished before the run ends
        raise

"""One training run from configuration to last step: check, claim the directory, build, train, report."""

from __future__ import annotations

import logging
import os
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moepp import comm
from moepp.build import build_parts, device_name
from moepp.checkpoint import choose_checkpoint, read_info
from moepp.config import Config, to_dict, validate
from moepp.data import check_data
from moepp.environment import describe_environment
from moepp.errors import MoeppError, PeerError
from moepp.guards import StopRequest
from moepp.metrics.logs import close_logging, setup_logging
from moepp.metrics.wandb import require_wandb_login
from moepp.parallel.groups import (
    ParallelGroups,
    build_groups,
    init_process_group,
    new_cpu_group,
    pick_device,
    read_launch_environment,
)
from moepp.run_dir import RunClaim, RunDir
from moepp.samples import write_samples
from moepp.trainer import Trainer

logger = logging.getLogger("moepp.run")

FIND_LOST_RANKS_SECONDS = 10.0  # ranks notice a lost connection at once, a hang all at the same time limit


def run_training(cfg: Config) -> None:
    """Train as ``cfg`` says, on as many processes as the launcher started.

    Raises:
        MoeppError: anything a user can cause, the same on every rank, before training starts.
    """
    launch = read_launch_environment()
    validate(cfg, launch.world_size)
    device = pick_device(launch.local_rank)
    init_process_group(launch, device, cfg.parallel.timeout_seconds)
    try:
        groups = build_groups(cfg.parallel.expert, device)
        comm.run_together(lambda: check_data(cfg))
        comm.run_together(lambda: require_wandb_login(cfg.logging.wandb.mode) if groups.rank == 0 else None)
        if cfg.eval.tasks:
            _check_tasks(cfg, groups)
        environment = describe_environment(device_name(device), groups.world_size)
        claim = comm.run_together(lambda: _claim(cfg, environment) if groups.rank == 0 else None)
        try:
            run_dir = RunDir(Path(comm.broadcast_object(str(claim.run_dir.path) if claim else None)))
            comm.run_together(lambda: setup_logging(run_dir.path, groups.rank))
            control = new_cpu_group()  # kept for one use: finding out who is gone
            try:
                _train(cfg, groups, run_dir, environment)
            except RuntimeError as error:
                if not comm.is_communication_error(error):
                    raise
                raise _peer_error(error, control, groups) from error
        finally:
            if claim is not None:
                claim.release()
    finally:
        close_logging()
        dist.destroy_process_group()


def _check_tasks(cfg: Config, groups: ParallelGroups) -> None:
    from moepp.evaluation.names import harness_tasks_folder

    comm.run_together(harness_tasks_folder)  # is lm-evaluation-harness installed?
    from moepp.evaluation.evaluate import check_tasks

    check_tasks(cfg.eval.tasks, cfg.eval.data, groups)


def _peer_error(error: RuntimeError, control: comm.Group, groups: ParallelGroups) -> PeerError:
    """Name the rank that is gone, and what this rank was doing when it noticed."""
    logger.debug("failed collective", exc_info=error)
    lost = comm.find_lost_ranks(control, FIND_LOST_RANKS_SECONDS)
    reason = " ".join(str(error).split())[:200]
    return PeerError(
        f"rank {groups.rank} stops: {lost} (noticed in {_collective_in(error)}: {reason}); look for that rank's own "
        "error, then start again: the run continues from its newest checkpoint"
    )


def _collective_in(error: RuntimeError) -> str:
    """The innermost function of this project, or else of torch.distributed, that was waiting."""
    names = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name != "wrapper"]
    own = [frame for frame in names if f"{os.sep}moepp{os.sep}" in frame.filename]
    innermost = names[-1].name if names else "a collective"
    return f"{own[-1].name} ({innermost})" if own and own[-1].name != innermost else innermost


def _claim(cfg: Config, environment: dict[str, Any]) -> RunClaim:
    return RunDir.claim(cfg.run.path, to_dict(cfg), environment, cfg.run.resume)


def _train(cfg: Config, groups: ParallelGroups, run_dir: RunDir, environment: dict[str, Any]) -> None:
    checkpoint = choose_checkpoint(cfg, run_dir.checkpoints, groups)
    start_step = read_info(checkpoint).step if checkpoint is not None else 0
    if start_step >= cfg.train.steps:
        logger.info("nothing to do: %s is at step %d; raise train.steps to go on", run_dir.path, start_step)
        return
    parts = build_parts(cfg, groups, run_dir, start_step, environment["packages"])
    with parts.sinks, StopRequest() as stop:
        trainer = Trainer(parts)
        if checkpoint is not None:
            trainer.resume(checkpoint)
        try:
            trainer.fit(stop)
        except MoeppError:
            parts.checkpointer.close()  # a save in flight is finished before the run ends
            raise
    if cfg.train.samples:
        write_samples(parts, run_dir.path)
    logger.info("finished step %d; everything is in %s", trainer.step, run_dir.path)

"""One training run from configuration to last step: check, claim the directory, build, train, report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moepp import comm
from moepp.build import build_parts, device_name
from moepp.checkpoint import choose_checkpoint, read_info
from moepp.config import Config, to_dict, validate
from moepp.data import check_data
from moepp.environment import describe_environment
from moepp.guards import StopRequest
from moepp.metrics.logs import close_logging, setup_logging
from moepp.metrics.wandb import require_wandb_login
from moepp.parallel.groups import (
    ParallelGroups,
    build_groups,
    init_process_group,
    pick_device,
    read_launch_environment,
)
from moepp.run_dir import RunClaim, RunDir
from moepp.samples import write_samples
from moepp.trainer import Trainer

logger = logging.getLogger("moepp.run")


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
        environment = describe_environment(device_name(device), groups.world_size)
        claim = comm.run_together(lambda: _claim(cfg, environment) if groups.rank == 0 else None)
        try:
            run_dir = RunDir(Path(comm.broadcast_object(str(claim.run_dir.path) if claim else None)))
            comm.run_together(lambda: setup_logging(run_dir.path, groups.rank))
            _train(cfg, groups, run_dir, environment)
        finally:
            if claim is not None:
                claim.release()
    finally:
        close_logging()
        dist.destroy_process_group()


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
        trainer.fit(stop)
    if cfg.train.samples:
        write_samples(parts, run_dir.path)
    logger.info("finished step %d; everything is in %s", trainer.step, run_dir.path)

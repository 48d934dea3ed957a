"""One training run from configuration to last step: check, claim the directory, build, train, report."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from moepp import comm
from moepp.build import build_parts, device_name
from moepp.config import Config, to_dict, validate
from moepp.data import check_data
from moepp.environment import describe_environment
from moepp.metrics.logs import close_logging, setup_logging
from moepp.metrics.wandb import check_wandb
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
        comm.run_together(lambda: check_wandb(cfg.logging.wandb) if groups.rank == 0 else None)
        claim = comm.run_together(lambda: _claim(cfg, groups) if groups.rank == 0 else None)
        try:
            _train(cfg, groups, Path(comm.broadcast_object(str(claim.run_dir.path) if claim else None)))
        finally:
            if claim is not None:
                claim.release()
    finally:
        close_logging()
        dist.destroy_process_group()


def _claim(cfg: Config, groups: ParallelGroups) -> RunClaim:
    environment = describe_environment(device_name(groups.device), groups.world_size)
    return RunDir.claim(cfg.run.path, to_dict(cfg), environment, cfg.run.resume)


def _train(cfg: Config, groups: ParallelGroups, run_path: Path) -> None:
    comm.run_together(lambda: setup_logging(run_path, groups.rank))
    parts = build_parts(cfg, groups, run_path, start_step=0)
    with parts.sinks:
        trainer = Trainer(parts)
        trainer.fit()
    if cfg.train.samples:
        write_samples(parts, run_path)
    logger.info("finished step %d; everything is in %s", trainer.step, run_path)

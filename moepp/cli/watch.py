"""Watch a running or finished run on the terminal: loss, throughput, routing by layer, checkpoints, warnings."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from moepp.errors import ConfigError, MoeppError, RunError
from moepp.io.untrusted import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

EXAMPLE = "moepp watch runs/tiny"
_REST = 9  # times the time that a look took


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN", help="directory of a run; it need not have logged anything yet")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="N", help="time between looks (default: 2)")
    parser.add_argument("--once", action="store_true", help="show it once; so it is where the output is no terminal")


def run(args: argparse.Namespace) -> int:
    """Show the run until Ctrl-C, or once. Only its files are read: a run is never disturbed."""
    from rich.console import Console
    from rich.live import Live

    from moepp.analysis.runs import read_run
    from moepp.analysis.watch import has_records, panel, waiting
    from moepp.runs.directory import RunDir

    path = Path(args.run_dir).expanduser().resolve()
    if not path.is_dir():
        raise RunError(f"{printable(args.run_dir)} is not a directory; name the directory of a run")
    if not 0.1 <= args.seconds <= 3600:
        raise ConfigError(f"--seconds={args.seconds} is not between 0.1 and 3600; correct it")
    if not (RunDir(path).metrics_file.exists() or RunDir(path).config_file.exists()):
        raise RunError(
            f"{printable(args.run_dir)} is no run (no config.yaml, no metrics.jsonl); name the directory of a run"
        )
    console = Console(highlight=False)
    if args.once or not sys.stdout.isatty():
        console.print(panel(read_run(path), width=console.width) if has_records(path) else waiting(path))
        return 0
    with Live(console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):  # the usual way to end it
        while True:
            begin = time.monotonic()
            live.update(look(path, console.width), refresh=True)
            # Of a long run, reading takes longer than the time between looks: it may not take a core for that.
            time.sleep(max(args.seconds, _REST * (time.monotonic() - begin)))
    return 0


def look(path: Path, width: int) -> RenderableType:
    """Return what is seen now; what cannot be read while the run writes it is said, and read again at the next look."""
    from moepp.analysis.runs import read_run
    from moepp.analysis.watch import has_records, panel, waiting

    try:
        return panel(read_run(path), width=width) if has_records(path) else waiting(path)
    except (MoeppError, OSError) as error:
        return printable(f"cannot be read now: {error}")

"""``moepp report RUN_DIR``: draw the loss curve again and print the closing summary of a run."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from moepp.errors import RunError
from moepp.report import read_inputs, write_report
from moepp.run_dir import RunDir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="directory of a run, for example runs/demo")
    parser.add_argument(
        "--unigram-entropy",
        type=float,
        metavar="NATS",
        help="entropy of the corpus's token frequencies, drawn as a line; default: what the run's last report used",
    )


def run(args: argparse.Namespace) -> int:
    """Write loss.png and summary.md into the run directory and print the summary."""
    path = Path(args.run_dir)
    if not path.is_dir():
        raise RunError(f"{path} is not a directory; name the directory of a run")
    run_dir = RunDir(path.resolve())
    inputs = read_inputs(run_dir)
    if args.unigram_entropy is not None:
        inputs = replace(inputs, unigram_entropy=args.unigram_entropy)
    print(write_report(run_dir, inputs), end="")
    return 0

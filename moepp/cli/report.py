"""Draw the loss curve of a run again and print its closing summary."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from moepp.errors import ConfigError, DataError, RunError
from moepp.io.untrusted import read_yaml, terminal_text
from moepp.runs.directory import RunDir
from moepp.runs.report import read_inputs, write_report

EXAMPLE = "moepp report runs/tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="directory of a run, for example runs/demo")
    parser.add_argument(
        "--unigram-entropy",
        type=float,
        metavar="NATS",
        help="entropy of the corpus's token frequencies, drawn as a line; default: counted from the validation tokens",
    )


def run(args: argparse.Namespace) -> int:
    """Write loss.png and summary.md into the run directory and print the summary."""
    path = Path(args.run_dir)
    if not path.is_dir():
        raise RunError(f"{path} is not a directory; name the directory of a run")
    if args.unigram_entropy is not None and args.unigram_entropy < 0:
        raise ConfigError(f"--unigram-entropy={args.unigram_entropy} is below 0, which no entropy is; correct it")
    run_dir = RunDir(path.resolve())
    inputs = read_inputs(run_dir)
    entropy = args.unigram_entropy if args.unigram_entropy is not None else inputs.unigram_entropy
    inputs = replace(inputs, unigram_entropy=entropy if entropy is not None else _entropy_of_data(run_dir))
    print(terminal_text(write_report(run_dir, inputs)), end="")
    return 0


def _entropy_of_data(run_dir: RunDir) -> float | None:
    """Return the entropy of the validation tokens; ``None`` for a blend of corpora or if the data is missing."""
    from moepp.data.prepare.inspect import unigram_entropy

    try:
        data = read_yaml(run_dir.config_file)["data"]
        return unigram_entropy(data["paths"][0], data["split"], "valid") if len(data["paths"]) == 1 else None
    except (OSError, KeyError, TypeError, ValueError, AttributeError, DataError):
        return None

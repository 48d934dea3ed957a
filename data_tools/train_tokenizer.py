"""A byte-level BPE tokenizer trained on a corpus: ``python -m data_tools.train_tokenizer INPUT... --output FILE``."""

from __future__ import annotations

import argparse
import sys

from moepp.cli.main import report_errors
from moepp.data.prepare.arguments import add_read_arguments, read_options
from moepp.data.prepare.train_tokenizer import DEFAULT_VOCAB_SIZE, train_tokenizer_file


def main(argv: list[str] | None = None) -> int:
    """Train a tokenizer and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.train_tokenizer", description=__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder or glob")
    parser.add_argument("--output", required=True, metavar="FILE", help="tokenizer.json to write")
    parser.add_argument("--vocab-size", type=int, default=DEFAULT_VOCAB_SIZE, help="tokens (default: %(default)s)")
    add_read_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    args = parser.parse_args(argv)

    def run() -> int:
        remarks = train_tokenizer_file(
            args.inputs,
            args.output,
            args.vocab_size,
            read=read_options(args),
            overwrite=args.overwrite,
            progress=True,
        )
        for remark in remarks:
            print(f"note: {remark}", file=sys.stderr)
        print(f"wrote {args.output}")
        return 0

    return report_errors(run)


if __name__ == "__main__":
    raise SystemExit(main())

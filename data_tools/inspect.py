"""What an indexed file holds: ``python -m data_tools.inspect PREFIX [--tokenizer tokenizer.json]``."""

from __future__ import annotations

import argparse

from moepp.cli.main import report_errors
from moepp.data.prepare.inspect import describe, unigram_entropy, verify


def main(argv: list[str] | None = None) -> int:
    """Print what indexed files hold and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.inspect", description=__doc__)
    parser.add_argument("prefix", metavar="PREFIX", help="indexed files, without .bin")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json, to show text and check the vocabulary")
    parser.add_argument("--split", default="96,3,1", help="as data.split (default: %(default)s)")
    parser.add_argument("--verify", action="store_true", help="compare checksums, too (reads everything)")
    args = parser.parse_args(argv)

    def run() -> int:
        if args.verify:
            verify(args.prefix)
        report = describe(args.prefix, args.tokenizer, args.split)
        report["unigram entropy, nats per token"] = unigram_entropy(args.prefix)
        for key, value in report.items():
            print(f"{key}: {value:,.2f}" if isinstance(value, float) else f"{key}: {value}")
        return 0

    return report_errors(run)


if __name__ == "__main__":
    raise SystemExit(main())

"""A mixed corpus of real text from Python and Debian packages: ``python -m data_tools.mixed``.

Writes one prefix per source and a tokenizer into data/mixed; ``python train.py experiment=study`` trains on it.
"""

from __future__ import annotations

import argparse
import sys

from moepp.cli.main import report_errors
from moepp.data.prepare.mixed import MIXED_FOLDER, SOURCES, VOCAB_SIZE, build_mixed
from moepp.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Download, clean and tokenise the corpus, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.mixed", description=__doc__)
    parser.add_argument("--output", default=MIXED_FOLDER, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="tokens (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    names = [source.name for source in SOURCES]
    parser.add_argument(
        "--sources", default=",".join(names), metavar="NAME[,NAME...]", help="default: all, %(default)s"
    )
    args = parser.parse_args(argv)

    def run() -> int:
        chosen = args.sources.split(",")
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise ConfigError(f"--sources {unknown[0]!r} is not one of {', '.join(names)}; correct it")
        manifests = build_mixed(
            args.output,
            args.vocab_size,
            args.workers,
            lambda remark: print(f"note: {remark}", file=sys.stderr),
            [source for source in SOURCES if source.name in chosen],
        )
        for name, manifest in manifests.items():
            print(f"{args.output}/{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")
        print(f"{args.output}: {sum(manifest.tokens for manifest in manifests.values()):,} tokens")
        return 0

    return report_errors(run)


if __name__ == "__main__":
    raise SystemExit(main())

"""Command-line options about reading text, shared by the programs that read it."""

from __future__ import annotations

import argparse

from moepp.data.prepare.readers import MAX_DOCUMENT_BYTES, TEXT_UNITS, ReadOptions


def add_read_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`read_options` takes."""
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME[,NAME...]",
        help="field of .jsonl, column of .parquet: the first of these that a document has, and that is not null, is "
        "its text (default: text)",
    )
    parser.add_argument(
        "--text-unit", choices=TEXT_UNITS, default="file", help="what a document is in .txt (default: file)"
    )
    parser.add_argument(
        "--max-bad-lines",
        type=int,
        default=0,
        metavar="N",
        help="leave out, count and list up to N lines, rows or texts that cannot be used: broken JSON or UTF-8, no "
        "text field, null, too long, the torn end of a .gz (default: 0, the first ends the work)",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=int,
        default=MAX_DOCUMENT_BYTES,
        metavar="N",
        help="refuse longer documents (for .jsonl: lines); tokenising takes about 100 bytes of memory for each "
        "(default: %(default)s)",
    )


def read_options(args: argparse.Namespace) -> ReadOptions:
    """Return the options given on the command line."""
    return ReadOptions(
        text_fields=tuple(args.text_field.split(",")),
        text_unit=args.text_unit,
        max_document_bytes=args.max_document_bytes,
        max_bad_lines=args.max_bad_lines,
    )

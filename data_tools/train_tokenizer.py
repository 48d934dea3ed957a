"""A byte-level BPE tokenizer trained on a corpus: ``python -m data_tools.train_tokenizer INPUT... --output FILE``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence

from data_tools.readers import TEXT_UNITS, find_inputs, read_documents
from data_tools.staging import write_atomically
from moepp.errors import DataError

EOD_TOKEN = "<|endoftext|>"
DEFAULT_VOCAB_SIZE = 8192
SMALLEST_VOCAB_SIZE = 257  # every byte, and the end-of-document token


def train_tokenizer(texts: Iterator[str], vocab_size: int, progress: bool = False) -> str:
    """Train byte-level BPE (GPT-2's pre-tokenisation) and return it as the content of a tokenizer.json.

    The same texts give the same tokenizer. Id 0 is ``<|endoftext|>``. A small corpus may not yield ``vocab_size``
    tokens; the tokenizer is then smaller.

    Raises:
        DataError: ``vocab_size`` cannot hold every byte.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise DataError(
            f"vocabulary size {vocab_size} is below {SMALLEST_VOCAB_SIZE} (bytes and {EOD_TOKEN}); raise it"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True)


def train_tokenizer_file(
    inputs: Sequence[str],
    output: str,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    *,
    text_field: str = "text",
    text_unit: str = "file",
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Train on ``inputs`` (files, folders, globs) and write ``output`` whole or not at all.

    Raises:
        DataError: unusable input, or ``output`` exists and ``overwrite`` is off.
    """
    paths = find_inputs(inputs)
    if os.path.exists(output) and not overwrite:
        raise DataError(f"tokenizer {output} exists; leave training out to use it, or give --overwrite")
    texts = (document.text for path in paths for document in read_documents(path, text_field, text_unit))
    content = train_tokenizer(_require_text(texts, paths), vocab_size, progress)
    write_atomically(output, content.encode("utf-8"))


def _require_text(texts: Iterator[str], paths: list[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text.strip()
        yield text
    if empty:
        raise DataError(f"the input holds no text to train a tokenizer on: {', '.join(paths[:3])}; name other files")


def main(argv: list[str] | None = None) -> int:
    from moepp.cli import report_errors

    parser = argparse.ArgumentParser(prog="python -m data_tools.train_tokenizer", description=__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder or glob")
    parser.add_argument("--output", required=True, metavar="FILE", help="tokenizer.json to write")
    parser.add_argument("--vocab-size", type=int, default=DEFAULT_VOCAB_SIZE, help="tokens (default: %(default)s)")
    parser.add_argument("--text-field", default="text", help="field of .jsonl, column of .parquet")
    parser.add_argument("--text-unit", choices=TEXT_UNITS, default="file", help="what a document is in .txt")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    args = parser.parse_args(argv)

    def run() -> int:
        train_tokenizer_file(
            args.inputs,
            args.output,
            args.vocab_size,
            text_field=args.text_field,
            text_unit=args.text_unit,
            overwrite=args.overwrite,
            progress=True,
        )
        print(f"wrote {args.output}")
        return 0

    return report_errors(run)


if __name__ == "__main__":
    raise SystemExit(main())

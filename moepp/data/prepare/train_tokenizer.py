"""A byte-level BPE tokenizer trained on a corpus."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from moepp.data.prepare.inputs import InputFile, find_inputs
from moepp.data.prepare.readers import DocumentReader, ReadOptions
from moepp.errors import DataError
from moepp.io.files import make_folder, write_whole
from moepp.io.untrusted import printable

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


def train_on_files(files: list[InputFile], vocab_size: int, read: ReadOptions, progress: bool = False) -> str:
    """Train on the documents of ``files`` and return the content of a tokenizer.json.

    Raises:
        DataError: unusable input, or no text in it.
    """
    reader = DocumentReader(read)
    texts = (document.text for file in files for document in reader.read(file))
    return train_tokenizer(_require_text(texts, files), vocab_size, progress)


def train_tokenizer_file(
    inputs: Sequence[str],
    output: str,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    *,
    read: ReadOptions | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> list[str]:
    """Train on ``inputs`` (files, folders, globs) and write ``output`` whole or not at all.

    Returns:
        Remarks of one line about inputs that were left out.

    Raises:
        DataError: unusable input, or ``output`` exists and ``overwrite`` is off.
    """
    found = find_inputs(inputs)
    if os.path.exists(output) and not overwrite:
        raise DataError(f"tokenizer {output} exists; leave training out to use it, or give --overwrite")
    content = train_on_files(found.files, vocab_size, read or ReadOptions(), progress)
    make_folder(os.path.dirname(os.path.abspath(output)))
    write_whole(output, content)
    return found.remarks()


def _require_text(texts: Iterator[str], files: list[InputFile]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text.strip()
        yield text
    if empty:
        names = ", ".join(printable(file.path) for file in files[:3])
        raise DataError(f"the input holds no text to train a tokenizer on: {names}; name other files")

"""Text to Megatron indexed files: the engine behind ``moepp prepare``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.encode import encode_documents
from data_tools.readers import find_inputs, read_documents
from data_tools.staging import publish, staging_folder
from moepp.data.indexed import IndexedFile, open_indexed
from moepp.data.manifest import Manifest, sha256_of
from moepp.data.tokenizer import Tokenizer
from moepp.errors import DataError

# A batch of documents for one worker: long enough to outweigh the hand-over, short enough for the progress bar.
BATCH_CHARACTERS = 1 << 19
COPY_CHUNK_BYTES = 1 << 24
LARGEST_UINT16_VOCABULARY = 65_500  # Megatron's bound (indexed_dataset.py, DType.optimal_dtype)


@dataclass(frozen=True)
class PrepareOptions:
    """How to turn text into PREFIX.bin, PREFIX.idx and PREFIX.json."""

    output: str  # PREFIX
    tokenizer: str  # path of tokenizer.json
    text_field: str = "text"  # of .jsonl and .parquet
    text_unit: str = "file"  # what a document is in .txt: "file", "paragraph" or "line"
    eod_token: str | None = None  # None: the first of moepp.data.tokenizer.EOD_TOKENS that the tokenizer has
    workers: int = 1  # processes
    append: bool = False  # add to what PREFIX holds
    overwrite: bool = False  # replace what PREFIX holds
    progress: bool = True  # progress bar, on a terminal


@dataclass
class _Tally:
    documents: int = 0
    tokens: int = 0
    empty_documents: int = 0
    max_token_id: int = 0


def prepare(inputs: Sequence[str], options: PrepareOptions) -> Manifest:
    """Tokenise ``inputs`` (files, folders, globs) in order into indexed files; documents without text are left out.

    The files appear whole or not at all: they are written and synced in a hidden folder beside PREFIX and then
    renamed, .idx last. Memory is bounded by a few batches of documents and 12 bytes per document.

    Returns:
        The manifest of what PREFIX holds afterwards.

    Raises:
        DataError: unusable input, tokenizer or output, or an input without any text.
    """
    paths = find_inputs(inputs)
    if options.workers < 1:
        raise DataError(f"--workers={options.workers} is below 1; give the number of processes")
    tokenizer = Tokenizer(options.tokenizer, options.eod_token)
    with staging_folder(options.output) as folder:
        check_output(options)
        existing = _open_for_append(options, tokenizer) if options.append else None
        try:
            return _write(paths, options, tokenizer, existing, folder)
        except BrokenProcessPool as error:
            raise DataError("a tokenizer process was killed, probably for lack of memory; lower --workers") from error
        except OSError as error:
            raise DataError(
                f"cannot write {options.output}: {error.strerror}; free space, or choose another --output"
            ) from error


def check_output(options: PrepareOptions) -> None:
    """Refuse to replace what PREFIX holds, or to add to nothing, unless the options say so.

    Raises:
        DataError: the output exists or not, against ``append`` and ``overwrite``.
    """
    prefix = options.output
    present = [prefix + suffix for suffix in (".bin", ".idx", ".json") if os.path.exists(prefix + suffix)]
    if options.append and options.overwrite:
        raise DataError("--append keeps what the output holds and --overwrite replaces it; give one of them")
    if options.append and not present:
        raise DataError(f"--append: there is no {prefix}.bin/.idx to add to; leave --append out")
    if present and not options.append and not options.overwrite:
        raise DataError(f"{present[0]} exists; choose another --output, or give --append or --overwrite")


def _open_for_append(options: PrepareOptions, tokenizer: Tokenizer) -> IndexedFile:
    prefix = options.output
    file = open_indexed(prefix, interrupted_append=True)
    if file.manifest is None:
        raise DataError(f"--append: {prefix}.json is missing, so its tokenizer is unknown; prepare it with --overwrite")
    if (file.manifest.tokenizer_sha256, file.manifest.eod_id) != (sha256_of(tokenizer.path), tokenizer.eod_id):
        raise DataError(
            f"--append: {prefix} was prepared with another tokenizer ({file.manifest.tokenizer_file}) or "
            f"end-of-document token than {tokenizer.path}; give that one, or choose another --output"
        )
    return file


def _write(
    paths: list[str], options: PrepareOptions, tokenizer: Tokenizer, existing: IndexedFile | None, folder: str
) -> Manifest:
    staged = os.path.join(folder, "text")
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size < LARGEST_UINT16_VOCABULARY else np.int32)
    encoder_arguments = (tokenizer.to_json(), tokenizer.eod_id, dtype.name)
    builder = _builder(f"{staged}.bin", dtype)
    try:
        if existing is not None:
            _copy_existing(builder, existing)
        tally = _add_documents(builder, paths, options, encoder_arguments)
        if tally.documents == 0:
            raise DataError(f"the input holds no text: {len(paths)} files, {tally.empty_documents} empty documents")
        builder.finalize(f"{staged}.idx")
    finally:
        builder.data_file.close()
    manifest = _manifest(paths, tokenizer, dtype, existing, tally, staged)
    with open(f"{staged}.json", "w", encoding="utf-8") as stream:
        stream.write(manifest.to_json())
    # An old index must not stand beside a new .bin, unless the .bin still begins with what the index describes.
    replaced = f"{options.output}.idx" if existing is None else None
    publish([(staged + suffix, options.output + suffix) for suffix in (".bin", ".json", ".idx")], replaced)
    return manifest


def _builder(bin_path: str, dtype: np.dtype) -> Any:
    import warnings

    with warnings.catch_warnings():  # of CUDA-only extensions that have no part in this
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    return IndexedDatasetBuilder(bin_path, dtype=dtype.type)


def _copy_existing(builder: Any, existing: IndexedFile) -> None:
    # Not builder.add_index: after an interrupted append the .bin is longer than its index says.
    remaining = existing.num_tokens * existing.dtype.itemsize
    with open(f"{existing.prefix}.bin", "rb") as stream:
        while remaining > 0:
            chunk = stream.read(min(COPY_CHUNK_BYTES, remaining))
            builder.data_file.write(chunk)
            remaining -= len(chunk)
    builder.sequence_lengths.extend(existing.lengths_Q.tolist())
    builder.document_indices.extend(range(1, existing.documents + 1))


def _add_documents(
    builder: Any, paths: list[str], options: PrepareOptions, encoder_arguments: tuple[str, int, str]
) -> _Tally:
    from tqdm import tqdm

    tally = _Tally()
    batches = _batches(paths, options, tally)
    total = sum(os.path.getsize(path) for path in paths)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="tokenising", disable=None if options.progress else True
    ) as bar:
        for documents, bytes_read in encode_documents(batches, encoder_arguments, options.workers):
            for tokens_T in documents:
                builder.add_document(tokens_T, [len(tokens_T)])
                tally.documents += 1
                tally.tokens += len(tokens_T)
                tally.max_token_id = max(tally.max_token_id, int(tokens_T.max()))
            bar.update(bytes_read)
            bar.set_postfix_str(f"{tally.documents:,} documents, {tally.tokens:,} tokens", refresh=False)
        bar.update(total - bar.n)
    return tally


def _batches(paths: list[str], options: PrepareOptions, tally: _Tally) -> Iterator[tuple[list[str], int]]:
    texts: list[str] = []
    characters = bytes_read = 0
    for path in paths:
        for document in read_documents(path, options.text_field, options.text_unit):
            bytes_read += document.bytes_read
            if not document.text.strip():
                tally.empty_documents += 1
                continue
            texts.append(document.text)
            characters += len(document.text)
            if characters >= BATCH_CHARACTERS:
                yield texts, bytes_read
                texts, characters, bytes_read = [], 0, 0
    if texts:
        yield texts, bytes_read


def _manifest(
    paths: list[str],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    existing: IndexedFile | None,
    tally: _Tally,
    staged: str,
) -> Manifest:
    source = {
        "files": [{"path": path, "bytes": os.path.getsize(path)} for path in paths],
        "documents": tally.documents,
        "tokens": tally.tokens,
        "empty_documents": tally.empty_documents,
    }
    manifest = Manifest(
        documents=tally.documents,
        tokens=tally.tokens,
        dtype=dtype.name,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        max_token_id=tally.max_token_id,
        tokenizer_file=os.path.basename(tokenizer.path),
        tokenizer_sha256=sha256_of(tokenizer.path),
        bin_bytes=os.path.getsize(f"{staged}.bin"),
        bin_sha256=sha256_of(f"{staged}.bin"),
        idx_bytes=os.path.getsize(f"{staged}.idx"),
        idx_sha256=sha256_of(f"{staged}.idx"),
        sources=(source,),
    )
    if existing is None or existing.manifest is None:
        return manifest
    return dataclasses.replace(
        manifest,
        documents=existing.documents + tally.documents,
        tokens=existing.num_tokens + tally.tokens,
        max_token_id=max(existing.manifest.max_token_id, tally.max_token_id),
        sources=(*_sources_of(existing.manifest, existing.documents), source),
    )


def _sources_of(manifest: Manifest, documents: int) -> list[dict[str, Any]]:
    """Sources of the first ``documents``: an interrupted append leaves a manifest that lists one source more."""
    kept = []
    for source in manifest.sources:
        if documents <= 0:
            break
        kept.append(source)
        documents -= source["documents"]
    return kept

"""Text to Megatron indexed files: the engine behind ``moepp prepare``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from moepp.config.schema import DataConfig
from moepp.data.indexed import IndexedFile, open_indexed
from moepp.data.manifest import Manifest, sha256_of
from moepp.data.megatron_core import import_lazily
from moepp.data.prepare.encode import Batch, Encoded, encode_documents
from moepp.data.prepare.inputs import InputFile, find_inputs
from moepp.data.prepare.options import PrepareOptions, check_options, check_output, require_kept
from moepp.data.prepare.order import UNKNOWN_INPUT, one_sided_splits, reorder, shuffled
from moepp.data.prepare.readers import DocumentReader
from moepp.data.prepare.staging import publish, staging_folder
from moepp.data.prepare.tally import Tally
from moepp.data.prepare.train_tokenizer import train_on_files
from moepp.data.tokenizer import Tokenizer
from moepp.errors import DataError, MoeppError
from moepp.io.untrusted import open_regular, printable
from moepp.io.write_errors import write_error

# A batch of documents for one worker: long enough to outweigh the hand-over, short enough for the progress bar.
BATCH_CHARACTERS = 1 << 19
COPY_CHUNK_BYTES = 1 << 24
LARGEST_UINT16_VOCABULARY = 65_500  # Megatron's bound (indexed_dataset.py, DType.optimal_dtype)


def prepare(inputs: Sequence[str], options: PrepareOptions, say: Callable[[str], None] = lambda _: None) -> Manifest:
    """Tokenise ``inputs`` (files, folders, globs) in order into indexed files; documents without text are left out.

    The files appear whole or not at all: they are written and synced in a hidden folder beside PREFIX and then
    renamed, .idx last. Memory is bounded by a few batches of documents and 16 bytes per document.

    Args:
        say: takes remarks of one line about everything that is left out, and about a one-sided split.

    Returns:
        The manifest of what PREFIX holds afterwards.

    Raises:
        DataError: unusable input, tokenizer or output, or an input without any text.
    """
    check_options(options)
    found = find_inputs(inputs)
    for remark in found.remarks():
        say(remark)
    require_kept(found.files, options)
    with staging_folder(options.output) as folder:
        check_output(options)
        try:
            tokenizer = _tokenizer(found.files, options, folder)
            existing = _open_for_append(options, tokenizer) if options.append else None
            return _write(found.files, options, tokenizer, existing, folder, say)
        except BrokenProcessPool as error:
            raise DataError("a tokenizer process was killed, probably for lack of memory; lower --workers") from error
        except MemoryError as error:
            raise DataError("the documents do not fit into memory; lower --max-document-bytes or --workers") from error
        except MoeppError:
            raise
        except OSError as error:
            raise write_error(error.errno, options.output) from error


def _tokenizer(files: list[InputFile], options: PrepareOptions, folder: str) -> Tokenizer:
    """Return the tokenizer to use: the given one, or one trained on the input, which is published with the data."""
    if options.train_vocab is None:
        return Tokenizer(options.tokenizer, options.eod_token, "--tokenizer")
    path = os.path.join(folder, "tokenizer.json")
    content = train_on_files(files, options.train_vocab, options.read, options.progress)
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(content)
    return Tokenizer(path, options.eod_token, "--tokenizer")


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
    files: list[InputFile],
    options: PrepareOptions,
    tokenizer: Tokenizer,
    existing: IndexedFile | None,
    folder: str,
    say: Callable[[str], None],
) -> Manifest:
    staged = os.path.join(folder, "text")
    dtype = _dtype(tokenizer)
    builder = _builder(f"{staged}.bin", dtype)
    try:
        if existing is not None:
            _copy_existing(builder, existing)
        tally = _add_documents(builder, files, options, (tokenizer, dtype))
        _require_text(tally, files, options)
        _order(builder, options, tally, existing, (files, dtype, f"{staged}.bin"), say)
        builder.finalize(f"{staged}.idx")
    finally:
        builder.data_file.close()
    for remark in tally.remarks(options.read.text_fields):
        say(remark)
    manifest = _manifest(files, tokenizer, options, existing, tally, staged)
    with open(f"{staged}.json", "w", encoding="utf-8") as stream:
        stream.write(manifest.to_json())
    # An old index must not stand beside a new .bin, unless the .bin still begins with what the index describes.
    replaced = f"{options.output}.idx" if existing is None else None
    finals = [(staged + suffix, options.output + suffix) for suffix in (".bin", ".json", ".idx")]
    if options.train_vocab is not None:
        finals.insert(0, (tokenizer.path, options.tokenizer))
    publish(folder, finals, replaced)
    return manifest


def _require_text(tally: Tally, files: list[InputFile], options: PrepareOptions) -> None:
    """Refuse an input of which nothing is left, or too little."""
    if tally.losses.share > options.max_lost_share:
        raise DataError(
            f"tokenizer {printable(options.tokenizer)} cannot represent {tally.lost_text()}: more than "
            f"--max-lost-share={options.max_lost_share}; take one that falls back to bytes, train one on this text "
            "(--train-tokenizer), or raise the share"
        )
    if tally.documents == 0:
        bad = f", {tally.reader.bad_lines.count} bad lines" if tally.reader.bad_lines.count else ""
        raise DataError(f"the input holds no text: {len(files)} files, {tally.empty_documents} empty documents{bad}")


def _order(
    builder: Any,
    options: PrepareOptions,
    tally: Tally,
    existing: IndexedFile | None,
    new: tuple[list[InputFile], np.dtype, str],
    say: Callable[[str], None],
) -> None:
    """Shuffle the new documents if asked to, and warn of splits of one input.

    Args:
        new: the input files, and type and path of the .bin.
    """
    files, dtype, bin_path = new
    names = [file.path for file in files]
    before = [] if existing is None or existing.manifest is None else _inputs_before(existing, names)
    inputs_N = np.array([*before, *tally.inputs], dtype=np.int32)
    if options.shuffle is not None:
        builder.data_file.flush()
        lengths_N = np.array(builder.sequence_lengths, dtype=np.int64)
        order_N = shuffled(len(lengths_N), options.shuffle, len(before))
        reorder(bin_path, lengths_N, order_N, dtype)
        builder.sequence_lengths[:] = lengths_N[order_N].tolist()
        inputs_N = inputs_N[order_N]
    for warning in one_sided_splits(inputs_N, names, DataConfig.split):
        say(warning)


def _inputs_before(existing: IndexedFile, names: list[str]) -> list[int]:
    """Return the input number of each earlier document, and add the names of those inputs."""
    assert existing.manifest is not None
    numbers: list[int] = []
    for source in _sources_of(existing.manifest, existing.documents):
        number = UNKNOWN_INPUT
        if len(source["files"]) == 1:
            number = len(names)
            names.append(source["files"][0]["path"])
        numbers += [number] * source["documents"]
    return numbers


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size < LARGEST_UINT16_VOCABULARY else np.int32)


def _builder(bin_path: str, dtype: np.dtype) -> Any:
    import warnings

    with warnings.catch_warnings():  # of CUDA-only extensions that have no part in this
        warnings.simplefilter("ignore")
        import_lazily()
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    return IndexedDatasetBuilder(bin_path, dtype=dtype.type)


def _copy_existing(builder: Any, existing: IndexedFile) -> None:
    # Not builder.add_index: after an interrupted append the .bin is longer than its index says.
    remaining = existing.num_tokens * existing.dtype.itemsize
    with open_regular(f"{existing.prefix}.bin") as stream:
        while remaining > 0:
            chunk = stream.read(min(COPY_CHUNK_BYTES, remaining))
            if not chunk:
                raise DataError(f"{existing.prefix}.bin was truncated while it was read; prepare it again")
            builder.data_file.write(chunk)
            remaining -= len(chunk)
    builder.sequence_lengths.extend(existing.lengths_Q.tolist())
    builder.document_indices.extend(range(1, existing.documents + 1))


def _add_documents(
    builder: Any, files: list[InputFile], options: PrepareOptions, target: tuple[Tokenizer, np.dtype]
) -> Tally:
    """Read, tokenise and write all documents. ``target``: tokenizer, and type of the .bin."""
    from tqdm import tqdm

    tokenizer, dtype = target
    tally = Tally(DocumentReader(options.read), tokenizer.eod_token, tokenizer.eod_id)
    encoder_arguments = (tokenizer.to_json(), tokenizer.eod_id, dtype.name, options.tokenizer)
    total = sum(file.bytes for file in files)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="tokenising", disable=None if options.progress else True
    ) as bar:
        for encoded, batch in encode_documents(_batches(files, tally), encoder_arguments, options.workers):
            _add_batch(builder, encoded, batch, tally)
            bar.update(batch.bytes_read)
            bar.set_postfix_str(f"{tally.documents:,} documents, {tally.tokens:,} tokens", refresh=False)
        bar.update(total - bar.n)
    return tally


def _add_batch(builder: Any, encoded: Encoded, batch: Batch, tally: Tally) -> None:
    tally.losses.add(encoded.losses)
    for tokens_T, number in zip(encoded.documents, batch.inputs, strict=True):
        if len(tokens_T) == 1:  # the end-of-document token alone
            tally.lost_documents += 1
            continue
        builder.add_document(tokens_T, [len(tokens_T)])
        tally.documents_with_eod += bool((tokens_T[:-1] == tally.eod_id).any())
        tally.inputs.append(number)
        tally.documents += 1
        tally.tokens += len(tokens_T)
        tally.max_token_id = max(tally.max_token_id, int(tokens_T.max()))


def _batches(files: list[InputFile], tally: Tally) -> Iterator[Batch]:
    batch, characters = Batch([]), 0
    for number, file in enumerate(files):
        for document in tally.reader.read(file):
            batch.bytes_read += document.bytes_read
            if not document.text.strip():
                tally.empty_documents += 1
                continue
            batch.texts.append(document.text)
            batch.inputs.append(number)
            characters += len(document.text)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = Batch([]), 0
    if batch.texts:
        yield batch


def _manifest(
    files: list[InputFile],
    tokenizer: Tokenizer,
    options: PrepareOptions,
    existing: IndexedFile | None,
    tally: Tally,
    staged: str,
) -> Manifest:
    source = {
        "files": [{"path": file.path, "bytes": file.bytes} for file in files],
        "documents": tally.documents,
        "tokens": tally.tokens,
        "empty_documents": tally.empty_documents,
        "lost_documents": tally.lost_documents,
        "documents_with_eod": tally.documents_with_eod,
        "lost_characters": tally.losses.lost_characters,
        "unknown_tokens": tally.losses.unknown_tokens,
        "bad_lines": tally.reader.bad_lines.count,
        "text_fields": tally.reader.field_counts,
        "shuffle": options.shuffle,
    }
    manifest = Manifest(
        documents=tally.documents,
        tokens=tally.tokens,
        dtype=_dtype(tokenizer).name,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        max_token_id=tally.max_token_id,
        tokenizer_file=os.path.basename(options.tokenizer),
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
    """Return the sources of the first ``documents``: after an interrupted append the manifest lists one more."""
    kept = []
    for source in manifest.sources:
        if documents <= 0:
            break
        kept.append(source)
        documents -= source["documents"]
    return kept

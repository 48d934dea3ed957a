"""Everything about the data that can be wrong, found before training starts and without importing Megatron."""

from __future__ import annotations

import os
from collections.abc import Sequence

from moepp.config.schema import Config
from moepp.data.corpora import Corpora, open_validation
from moepp.data.indexed import SPLITS, IndexedFile, allow_open_files, open_indexed
from moepp.data.manifest import sha256_of
from moepp.data.tokenizer import Tokenizer
from moepp.data.vocabulary import read_vocabulary
from moepp.errors import DataError


def check_data(cfg: Config) -> Corpora:
    """Open the data of a run and refuse what cannot be trained on. Relative paths start at the current directory.

    Reads indices and manifests only; a .bin without a manifest is scanned for its largest token id.

    Raises:
        DataError: one line with the file, the rule it breaks and the remedy.
    """
    allow_open_files()
    files = tuple(open_indexed(prefix) for prefix in cfg.data.paths)
    for file in files:
        _check_size(file, cfg)
    _check_evaluation(files, cfg)
    validation = {name: _open_validation(name, cfg) for name in cfg.data.validation}
    all_files = (*files, *(file for of_set in validation.values() for file in of_set))
    for file in all_files:
        _check_token_ids(file, cfg)
    _check_tokenizers(all_files, cfg)
    _check_document_ends(all_files, cfg)
    _check_documents_are_known(all_files, cfg)
    _check_cache_dir(cfg.data.cache_dir)
    return Corpora(files, read_vocabulary(cfg, files), cfg.data.tokenizer, validation)


def held_out_batches(cfg: Config) -> int:
    """Return the validation split's global batches that a run reads: for evaluations, and one per sample."""
    evaluated = cfg.train.eval_batches if cfg.data.evaluates_split else 0
    return max(evaluated, cfg.train.samples if cfg.data.tokenizer is not None else 0)


def _open_validation(name: str, cfg: Config) -> tuple[IndexedFile, ...]:
    """Open one set of ``data.validation``, all of whose documents are evaluated."""
    files, needed = open_validation(name, cfg), cfg.data.seq_len + 1
    for file in files:
        if file.num_tokens < needed:
            raise DataError(
                f"{file.prefix} (data.validation.{name}) has {file.num_tokens} tokens, fewer than one sequence of "
                f"data.seq_len + 1 = {needed}; lower data.seq_len, add documents, or leave it out"
            )
    return files


def _check_size(file: IndexedFile, cfg: Config) -> None:
    if file.documents == 0 or file.num_tokens == 0:
        raise DataError(
            f"{file.prefix} is an empty corpus: {file.documents} documents with {file.num_tokens} tokens; "
            "prepare it from files that hold text"
        )
    tokens, needed = file.split_tokens(cfg.data.split)[0], cfg.data.seq_len + 1
    if tokens < needed:
        raise DataError(
            f"{file.prefix} has {tokens} training tokens (data.split={cfg.data.split}), fewer than one sequence of "
            f"data.seq_len + 1 = {needed}; lower data.seq_len, or add data"
        )


def _check_evaluation(files: Sequence[IndexedFile], cfg: Config) -> None:
    if held_out_batches(cfg) == 0:
        return
    for file in files:
        tokens, needed = file.split_tokens(cfg.data.split)[SPLITS.index("valid")], cfg.data.seq_len + 1
        if tokens < needed:
            raise DataError(
                f"{file.prefix} has {tokens} validation tokens (data.split={cfg.data.split} of {file.documents} "
                f"documents), fewer than one sequence of data.seq_len + 1 = {needed}; raise the second share of "
                "data.split, add documents, or set train.eval_batches=0 and train.samples=0"
            )


def _check_token_ids(file: IndexedFile, cfg: Config) -> None:
    low, high = file.token_id_range()
    if low < 0:
        raise DataError(f"{file.prefix}.bin holds the negative token id {low}; it is corrupt: prepare it again")
    largest = high if file.manifest is None else max(high, file.manifest.vocab_size - 1)
    if largest >= cfg.model.vocab_size:
        what = f"token ids up to {high}" if high >= cfg.model.vocab_size else f"a vocabulary of {largest + 1} tokens"
        raise DataError(
            f"{file.prefix} has {what} and model.vocab_size is {cfg.model.vocab_size}; "
            f"set model.vocab_size to at least {largest + 1}, or prepare the data with a smaller tokenizer"
        )


def _check_tokenizers(files: Sequence[IndexedFile], cfg: Config) -> None:
    made_with = {f.manifest.tokenizer_sha256: f.prefix for f in files if f.manifest is not None}
    if len(made_with) > 1:
        raise DataError(
            f"{_sections(cfg)} {' and '.join(made_with.values())} were prepared with different tokenizers; "
            "prepare all of them with the same tokenizer.json"
        )
    path = cfg.data.tokenizer
    if path is None:
        return
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise DataError(
            f"tokenizer {path} has {tokenizer.vocab_size} tokens and model.vocab_size is {cfg.model.vocab_size}; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    if made_with and sha256_of(path) not in made_with:
        raise DataError(
            f"tokenizer {path} is not the one that {next(iter(made_with.values()))} was prepared with "
            "(their checksums differ); point data.tokenizer at that one, or set data.tokenizer=null"
        )


def _sections(cfg: Config) -> str:
    return "data.paths and data.validation" if cfg.data.validation else "data.paths"


def _check_document_ends(files: Sequence[IndexedFile], cfg: Config) -> None:
    """Check that one token ends all documents, and that the tokenizer has it."""
    ends = {f.manifest.eod_id: f.prefix for f in files if f.manifest is not None}
    if len(ends) > 1:
        told = " and ".join(f"{prefix} (id {eod_id})" for eod_id, prefix in ends.items())
        raise DataError(
            f"{_sections(cfg)} {told} end their documents with different tokens; prepare all of them "
            "with the same --eod-token"
        )
    if cfg.data.tokenizer is None:
        return
    tokenizer = Tokenizer(cfg.data.tokenizer, eod_id=next(iter(ends), None))
    if cfg.eval.tasks:
        _ = tokenizer.eod_token  # benchmarks start documents with it


def _check_documents_are_known(files: Sequence[IndexedFile], cfg: Config) -> None:
    """Where attention stays within documents, every path must say which token ends them."""
    unknown = [file.prefix for file in files if file.manifest is None]
    if cfg.data.document_attention and unknown:
        raise DataError(
            f"data.document_attention=true needs the token that ends documents and {unknown[0]}.json, which tells it, "
            "is missing; prepare the data with `moepp prepare`, or set data.document_attention=false"
        )


def _check_cache_dir(cache_dir: str | None) -> None:
    if cache_dir is None:
        return
    try:
        os.makedirs(cache_dir, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"data.cache_dir={cache_dir} cannot be created: {error.strerror}; choose a folder you may write to"
        ) from error
    if not os.access(cache_dir, os.W_OK | os.X_OK):
        raise DataError(f"data.cache_dir={cache_dir} is not writable; choose a folder you may write to")

"""What an indexed file holds, for people, and whether it is whole."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from moepp.data.indexed import SCAN_CHUNK_TOKENS, open_indexed, split_bounds
from moepp.data.manifest import Manifest, sha256_of
from moepp.data.tokenizer import Tokenizer
from moepp.errors import DataError

PREVIEW_TOKENS = 200


def verify(prefix: str) -> Manifest:
    """Check PREFIX.bin and PREFIX.idx against the checksums of PREFIX.json.

    Raises:
        DataError: missing, corrupt, without a manifest, or changed since they were prepared.
    """
    manifest = open_indexed(prefix).manifest
    if manifest is None:
        raise DataError(f"{prefix}.json does not exist, so {prefix} cannot be verified; prepare it again")
    for suffix, expected in ((".bin", manifest.bin_sha256), (".idx", manifest.idx_sha256)):
        if sha256_of(prefix + suffix) != expected:
            raise DataError(f"{prefix}{suffix} differs from its checksum in {prefix}.json; prepare it again")
    return manifest


def unigram_entropy(prefix: str, split: str | None = None, part: str = "valid") -> float:
    """Return the entropy of the token distribution, in nats per token: the loss of the best model that ignores context.

    Args:
        split: as ``data.split``, to count only its ``part`` ('train', 'valid' or 'test'); None: the whole file.

    Raises:
        DataError: missing or corrupt files, or no token to count.
    """
    file = open_indexed(prefix)
    tokens_T = file.tokens_T() if split is None else file.tokens_of_split(split, part)
    if len(tokens_T) == 0:
        raise DataError(f"{prefix} has no token in {'it' if split is None else part}; the entropy is undefined")
    counts_V = np.zeros(file.token_id_range()[1] + 1, dtype=np.int64)
    for start in range(0, len(tokens_T), SCAN_CHUNK_TOKENS):
        chunk_T = tokens_T[start : start + SCAN_CHUNK_TOKENS]
        if chunk_T.min() < 0 or chunk_T.max() >= len(counts_V):
            raise DataError(
                f"{prefix}.bin holds token ids from {chunk_T.min()} to {chunk_T.max()}, and 0 to {len(counts_V) - 1} "
                "are known; it is damaged: copy it again, or prepare it again"
            )
        counts_V += np.bincount(chunk_T, minlength=len(counts_V))
    share_V = counts_V[counts_V > 0] / len(tokens_T)
    return float(-(share_V * np.log(share_V)).sum())


def describe(prefix: str, tokenizer_path: str | None = None, split: str = "96,3,1") -> dict[str, Any]:
    """Return counts, sizes and the beginning of the first document; the vocabulary is checked against the tokenizer.

    Raises:
        DataError: unusable files, or token ids that the tokenizer does not have.
    """
    file = open_indexed(prefix)
    low, high = file.token_id_range() if file.num_tokens else (0, 0)
    report: dict[str, Any] = {
        "documents": file.documents,
        "tokens": file.num_tokens,
        "dtype": file.dtype.name,
        "megabytes": os.path.getsize(f"{prefix}.bin") / 1e6,
        "tokens per document": file.num_tokens / max(file.documents, 1),
        "token ids": f"{low} to {high}",
        "documents of train, valid, test": [end - begin for begin, end in split_bounds(split, len(file.lengths_Q))],
        "tokens of train, valid, test": list(file.split_tokens(split)),
    }
    if file.manifest is not None:
        report["vocabulary"] = file.manifest.vocab_size
        report["end-of-document id"] = file.manifest.eod_id
        report["sources"] = [entry["path"] for source in file.manifest.sources for entry in source["files"]]
    first_T = file.tokens_T()[: min(PREVIEW_TOKENS, int(file.lengths_Q[0]))].tolist() if file.documents else []
    if tokenizer_path is None:
        report["first tokens"] = first_T
        return report
    tokenizer = Tokenizer(tokenizer_path, named_by="--tokenizer")
    if high >= tokenizer.vocab_size:
        raise DataError(
            f"{prefix} holds token id {high} and {tokenizer_path} has {tokenizer.vocab_size} tokens; "
            "give the tokenizer that it was prepared with"
        )
    report["first text"] = tokenizer.decode(first_T)
    return report

"""A small reader of Megatron indexed files: checks and statistics without importing Megatron.

Layout of PREFIX.idx, little endian (megatron/core/datasets/indexed_dataset.py, _IndexWriter): magic of 9 bytes,
uint64 version 1, uint8 dtype code, uint64 number of sequences Q, uint64 number of document boundaries, int32
length of each sequence in tokens, int64 byte offset of each sequence in PREFIX.bin, int64 document boundaries
(as sequence indices, starting with 0). PREFIX.bin holds the tokens and nothing else.

Shape suffixes: Q sequences (`moepp prepare` writes one per document), T tokens.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import math
import os
import resource
import struct
from dataclasses import dataclass

import numpy as np

from moepp.data.manifest import Manifest, read_manifest
from moepp.data.remedies import read_remedy
from moepp.errors import DataError
from moepp.io.untrusted import open_regular, why_no_file

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TOKEN_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
SCAN_CHUNK_TOKENS = 1 << 24
# Bound on reading a .bin that has no manifest: about 4 s from a fast disk (assumption: 1 GB/s).
SCAN_LIMIT_BYTES = 4 << 30
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class IndexedFile:
    """An opened pair PREFIX.bin, PREFIX.idx whose sizes agree with each other and with the manifest."""

    prefix: str
    dtype: np.dtype
    lengths_Q: np.ndarray  # tokens of each sequence, int32
    documents: int
    manifest: Manifest | None

    @property
    def num_tokens(self) -> int:
        return int(self.lengths_Q.sum(dtype=np.int64))

    def tokens_T(self) -> np.ndarray:
        """Return all tokens in file order, memory-mapped."""
        if self.num_tokens == 0:
            return np.zeros(0, dtype=self.dtype)
        return np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r", shape=(self.num_tokens,))

    def split_tokens(self, split: str) -> tuple[int, ...]:
        """Return tokens of train, validation and test under ``split``, for example '96,3,1'."""
        bounds = split_bounds(split, len(self.lengths_Q))
        return tuple(int(self.lengths_Q[begin:end].sum(dtype=np.int64)) for begin, end in bounds)

    def tokens_of_split(self, split: str, part: str) -> np.ndarray:
        """Return tokens of one part ('train', 'valid', 'test') of ``split``, in file order, memory-mapped."""
        begin, end = split_bounds(split, len(self.lengths_Q))[SPLITS.index(part)]
        first = int(self.lengths_Q[:begin].sum(dtype=np.int64))
        return self.tokens_T()[first : first + int(self.lengths_Q[begin:end].sum(dtype=np.int64))]

    def token_id_range(self) -> tuple[int, int]:
        """Return the smallest and largest token id, from the manifest or the .bin's first ``SCAN_LIMIT_BYTES``."""
        if self.manifest is not None:
            return 0, self.manifest.max_token_id
        tokens_T = self.tokens_T()[: SCAN_LIMIT_BYTES // self.dtype.itemsize]
        low = high = int(tokens_T[0])
        for start in range(0, len(tokens_T), SCAN_CHUNK_TOKENS):
            chunk = tokens_T[start : start + SCAN_CHUNK_TOKENS]
            low, high = min(low, int(chunk.min())), max(high, int(chunk.max()))
        return low, high

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when anything changes that dataset indices are made from."""
        digest = hashlib.blake2b(str(self.dtype).encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self.lengths_Q).data)
        return digest.hexdigest()


def split_bounds(split: str, num_sequences: int) -> tuple[tuple[int, int], ...]:
    """Return the first and one-past-last sequence of train, validation and test.

    The rule is Megatron's (blended_megatron_dataset_builder.py): cumulative shares of the number of sequences,
    rounded, so that the three never overlap.
    """
    shares = np.array([float(part) for part in split.split(",")], dtype=np.float64)
    if not math.isfinite(shares.sum()) or shares.sum() <= 0:
        raise DataError(f"data.split={split!r} has shares without a finite sum; write for example '96,3,1'")
    shares = (shares / shares.sum()).tolist()
    edges = [0.0]
    for share in shares:
        edges.append(edges[-1] + share)
    rows = [round(edge * float(num_sequences)) for edge in edges]
    return tuple(itertools.pairwise(rows))


def allow_open_files() -> None:
    """Let this process open as many files as the system lets it: each path takes up to six."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # not everywhere; then the soft limit stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_indexed(prefix: str, *, key: str = "data.paths", interrupted_append: bool = False) -> IndexedFile:
    """Open PREFIX.bin and PREFIX.idx and check that they are whole.

    ``key`` is what named PREFIX.

    ``interrupted_append`` accepts what an append that died between its renames leaves: the old index beside a longer
    .bin whose beginning it describes, and either manifest.

    Raises:
        DataError: missing, unreadable, corrupt or truncated, or not the files that PREFIX.json describes.
    """
    bin_path, idx_path = f"{prefix}.bin", f"{prefix}.idx"
    _require_both(prefix, key)
    try:
        idx_bytes, bin_bytes = os.path.getsize(idx_path), os.path.getsize(bin_path)
        with open_regular(bin_path), open_regular(idx_path) as stream:
            header = stream.read(HEADER.size)
        dtype, num_sequences, num_boundaries = _parse_header(idx_path, header)
        expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
        if idx_bytes != expected:
            raise DataError(
                f"{idx_path} is {idx_bytes} bytes and its header asks for {expected}; it is truncated or not an index "
                "of text: prepare it again"
            )
        content = np.memmap(idx_path, mode="r", dtype=np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {prefix}.bin/.idx: {error.strerror}; {read_remedy(error)}") from error
    lengths_Q, offsets_Q, boundaries = _arrays(content, num_sequences, num_boundaries)
    described = _check_arrays(prefix, lengths_Q, offsets_Q, boundaries, dtype)
    manifest = read_manifest(prefix)
    file = IndexedFile(prefix, dtype, lengths_Q, num_boundaries - 1, manifest)
    if interrupted_append and described <= bin_bytes:
        return file
    if described != bin_bytes:
        raise DataError(
            f"{prefix}.bin has {bin_bytes} bytes and {prefix}.idx describes {described}; it is truncated, belongs to "
            "another index, or an append was interrupted: repeat that append, or prepare it again"
        )
    if manifest is not None and (manifest.bin_bytes, manifest.idx_bytes) != (bin_bytes, idx_bytes):
        raise DataError(
            f"{prefix}.json describes {manifest.bin_bytes} + {manifest.idx_bytes} bytes and {prefix}.bin/.idx have "
            f"{bin_bytes} + {idx_bytes}; they do not belong together: prepare {prefix} again"
        )
    if manifest is not None:
        told = manifest.documents, manifest.tokens, manifest.dtype
        found = file.documents, file.num_tokens, dtype.name
        if told != found:
            raise DataError(
                f"{prefix}.json tells of {told[0]} documents with {told[1]} tokens of {told[2]}, and {prefix}.idx of "
                f"{found[0]} with {found[1]} of {found[2]}; they do not belong together: prepare {prefix} again"
            )
    return file


def _require_both(prefix: str, key: str) -> None:
    present = [suffix for suffix in (".bin", ".idx") if os.path.isfile(prefix + suffix)]
    if len(present) == 2:
        return
    if present:
        missing = ".idx" if present == [".bin"] else ".bin"
        why = why_no_file(prefix + missing)
        raise DataError(
            f"{prefix}{present[0]} exists and {prefix}{missing} {'does not' if why == 'does not exist' else why}; an "
            "interrupted copy or preparation: copy both, or prepare it again with --overwrite"
        )
    folder = os.path.dirname(prefix) or "."
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
        raise DataError(f"{key} entry {prefix}: folder {folder} is not readable; check its permissions")
    stem, suffix = os.path.splitext(prefix)
    hint = f"give the prefix without its ending, {stem}" if suffix in (".bin", ".idx") else f"check {key}"
    if inside := sorted(glob.glob(os.path.join(glob.escape(prefix), "*.idx"))):
        hint = f"it is a folder: name the prefix in it, {inside[0].removesuffix('.idx')}"
    raise DataError(
        f"{key} entry {prefix} names no data: neither {prefix}.bin nor {prefix}.idx exists below {os.getcwd()}; "
        f"{hint}, or write it with `moepp prepare` (demo data: `moepp prepare --demo`)"
    )


def _parse_header(idx_path: str, header: bytes) -> tuple[np.dtype, int, int]:
    if len(header) < HEADER.size:
        raise DataError(f"{idx_path} has {len(header)} bytes, fewer than its header of {HEADER.size}; prepare it again")
    magic, version, code, num_sequences, num_boundaries = HEADER.unpack(header)
    if magic != MAGIC or version != 1:
        raise DataError(f"{idx_path} does not start with Megatron's MMIDIDX version 1; prepare it with `moepp prepare`")
    if code not in TOKEN_DTYPES:
        raise DataError(f"{idx_path} has dtype code {code}, not a whole-number type of tokens; prepare it again")
    return np.dtype(TOKEN_DTYPES[code]), num_sequences, num_boundaries


def _arrays(content: np.ndarray, num_sequences: int, num_boundaries: int) -> tuple[np.ndarray, ...]:
    start = HEADER.size
    lengths_Q = np.frombuffer(content, np.int32, num_sequences, start)
    offsets_Q = np.frombuffer(content, np.int64, num_sequences, start + 4 * num_sequences)
    boundaries = np.frombuffer(content, np.int64, num_boundaries, start + 12 * num_sequences)
    return lengths_Q, offsets_Q, boundaries


def _check_arrays(
    prefix: str,
    lengths_Q: np.ndarray,
    offsets_Q: np.ndarray,
    boundaries: np.ndarray,
    dtype: np.dtype,
) -> int:
    """Check that the index agrees with itself; returns the bytes of the .bin that it describes."""
    ends_Q = np.cumsum(lengths_Q, dtype=np.int64) * dtype.itemsize
    starts_Q = ends_Q - lengths_Q.astype(np.int64) * dtype.itemsize
    monotone = len(boundaries) > 0 and boundaries[0] == 0 and bool(np.all(np.diff(boundaries) >= 0))
    if np.any(lengths_Q < 0) or not np.array_equal(starts_Q, offsets_Q) or not monotone:
        raise DataError(f"{prefix}.idx is corrupt: its lengths, offsets and documents disagree; prepare it again")
    if boundaries[-1] != len(lengths_Q):
        raise DataError(f"{prefix}.idx is corrupt: its documents end at {boundaries[-1]} of {len(lengths_Q)} sequences")
    return int(ends_Q[-1]) if len(ends_Q) else 0

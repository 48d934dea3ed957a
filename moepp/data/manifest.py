"""The manifest that ``moepp prepare`` writes beside an indexed file: what it holds and how to tell it is whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moepp.errors import DataError
from moepp.io.untrusted import open_regular, printable, read_json, show

MAX_BYTES = 256 << 20  # names of some million input files
DTYPES = ("uint16", "int32")  # what `moepp prepare` writes


@dataclass(frozen=True)
class Manifest:
    """Contents of ``PREFIX.json``."""

    documents: int
    tokens: int  # end-of-document tokens included
    dtype: str  # numpy name of one token in the .bin
    vocab_size: int  # of the tokenizer, added tokens included
    eod_id: int  # token after every document
    max_token_id: int  # largest token id in the .bin
    tokenizer_file: str
    tokenizer_sha256: str
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    # One entry per `moepp prepare` call: {"files": [{"path", "bytes"}], "documents", "tokens", "empty_documents"}.
    sources: tuple[dict[str, Any], ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def read_manifest(prefix: str) -> Manifest | None:
    """Return the manifest of ``prefix``, or None where there is no ``PREFIX.json``.

    Raises:
        DataError: the file cannot be read, is not a manifest, or contradicts itself.
    """
    path = f"{prefix}.json"
    if not os.path.lexists(path):
        return None
    remedy = f"restore it, or prepare {printable(prefix)} again"
    tree = read_json(Path(path), MAX_BYTES, DataError, remedy)
    try:
        manifest = _built(tree)
        _require_consistent(manifest)
    except ValueError as problem:
        raise DataError(f"{printable(path)} is not a manifest of `moepp prepare`: {problem}; {remedy}") from None
    return manifest


def _built(tree: Any) -> Manifest:
    """Return the manifest with the fields of ``tree``; ValueError: one is missing, unknown or of the wrong form."""
    names = {f.name: f.type for f in dataclasses.fields(Manifest)}
    _require(isinstance(tree, dict), "it holds no object")
    _require(set(tree) == set(names), f"its keys are not {', '.join(names)}")
    for name, kind in names.items():
        value = tree[name]
        if kind == "int":
            _require_count(name, value)
        elif kind == "str":
            _require(isinstance(value, str), f"{name} is {show(value)}")
        if name.endswith("sha256"):
            _require(re.fullmatch("[0-9a-f]{64}", value) is not None, f"{name} is {show(value)}")
    _require(isinstance(tree["sources"], list) and len(tree["sources"]) > 0, "sources is no list of them")
    for source in tree["sources"]:
        _require(isinstance(source, dict), f"a source is {show(source)}")
        for name in ("documents", "tokens", "empty_documents"):
            _require_count(f"{name} of a source", source.get(name))
        files = source.get("files")
        for file in files if isinstance(files, list) else [None]:
            entry: dict = file if isinstance(file, dict) else {}
            _require(isinstance(entry.get("path"), str), f"a file of a source is {show(file)}")
            _require_count("bytes of a file", entry.get("bytes"))
    return Manifest(**{**tree, "sources": tuple(tree["sources"])})


def _require_consistent(manifest: Manifest) -> None:
    """Raise ValueError for numbers that no indexed file has."""
    m = manifest
    _require(m.dtype in DTYPES, f"dtype is {show(m.dtype)}, not one of {', '.join(DTYPES)}")
    kind = np.dtype(m.dtype)
    _require(1 <= m.documents <= m.tokens, f"it tells of {m.documents} documents with {m.tokens} tokens")
    _require(m.bin_bytes == m.tokens * kind.itemsize, f"{m.tokens} tokens of {m.dtype} are not {m.bin_bytes} bytes")
    for name in ("documents", "tokens"):
        total = sum(source[name] for source in m.sources)
        _require(total == getattr(m, name), f"{name} is {getattr(m, name)}, and its sources have {total}")
    largest = np.iinfo(kind).max
    _require(m.vocab_size - 1 <= largest, f"vocab_size {m.vocab_size} is more than {m.dtype} can tell apart")
    # The end-of-document token ends every document, so it is one of those that max_token_id is the largest of.
    _require(
        m.eod_id <= m.max_token_id < m.vocab_size,
        f"eod_id {m.eod_id}, max_token_id {m.max_token_id} and vocab_size {m.vocab_size} do not go up in this order",
    )


def _require_count(name: str, value: Any) -> None:
    _require(type(value) is int and 0 <= value < 1 << 63, f"{name} is {show(value)}")


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def sha256_of(path: str) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

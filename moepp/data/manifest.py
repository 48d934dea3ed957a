"""The manifest that ``moepp prepare`` writes beside an indexed file: what it holds and how to tell it is whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from moepp.data.remedies import read_remedy
from moepp.errors import DataError


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
        DataError: the file cannot be read or is not a manifest.
    """
    path = f"{prefix}.json"
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as stream:
            tree = json.load(stream)
        manifest = Manifest(**{**tree, "sources": tuple(tree["sources"])})
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {read_remedy(error)}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is not a manifest of `moepp prepare`; prepare {prefix} again") from error
    hints = {f.name: int if f.type == "int" else str for f in dataclasses.fields(Manifest) if f.name != "sources"}
    if any(type(getattr(manifest, name)) is not kind for name, kind in hints.items()):
        raise DataError(f"{path} is not a manifest of `moepp prepare`; prepare {prefix} again")
    return manifest


def sha256_of(path: str) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""What tells a dataset, or any large file, from another one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepp.data.indexed import IndexedFile
from moepp.data.manifest import sha256_of
from moepp.io.untrusted import open_regular

SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096  # how much of a file is looked at
_SHA256_DIGITS = 64


def sampled_digest(path: Path, blocks: int = SAMPLED_BLOCKS) -> str:
    """Return a digest of blocks spread evenly over a file: cheap for any size, different for different text.

    Args:
        blocks: of 4 kB; a file that is no larger than all of them is read whole.
    """
    digest, size = hashlib.blake2b(digest_size=16), path.stat().st_size
    with open_regular(path) as stream:
        for i in range(blocks):
            stream.seek(i * max(size - BLOCK_BYTES, 0) // max(blocks - 1, 1))
            digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def identify(file: IndexedFile, content: str | None = None) -> dict[str, Any]:
    """Return a dataset's record in a checkpoint; ``content`` is its tokens' digest (None: the cheapest one)."""
    if content is None:
        content = file.manifest.bin_sha256 if file.manifest is not None else sampled_digest(_bin(file))
    return {"tokens": file.num_tokens, "documents": file.documents, "lengths": file.fingerprint(), "content": content}


def identify_like(old: Mapping[str, Any], file: IndexedFile) -> dict[str, Any]:
    """As :func:`identify`, with the digest that ``old`` has: a copy may have lost its manifest, or got one."""
    had_manifest = len(str(old.get("content"))) == _SHA256_DIGITS
    if had_manifest == (file.manifest is not None):
        return identify(file)
    return identify(file, sha256_of(str(_bin(file))) if had_manifest else sampled_digest(_bin(file)))


def _bin(file: IndexedFile) -> Path:
    return Path(f"{file.prefix}.bin")

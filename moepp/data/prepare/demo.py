"""The demo data in one go: corpus, tokenizer and indexed files below data/demo (``moepp prepare --demo``)."""

from __future__ import annotations

import os

from moepp.data.manifest import Manifest, sha256_of
from moepp.data.prepare.corpora import write_sotu
from moepp.data.prepare.inspect import verify
from moepp.data.prepare.pipeline import PrepareOptions, prepare
from moepp.data.prepare.train_tokenizer import DEFAULT_VOCAB_SIZE, train_tokenizer_file
from moepp.errors import DataError

DEMO_FOLDER = os.path.join("data", "demo")


def build_demo(folder: str = DEMO_FOLDER, workers: int = 1, progress: bool = True) -> tuple[Manifest, bool]:
    """Write ``sotu.jsonl.gz``, ``tokenizer.json`` and ``text.{bin,idx,json}`` into ``folder`` unless they are whole.

    Returns:
        The manifest, and whether anything had to be written.

    Raises:
        DataError: the corpus package is missing, or ``folder`` is not writable.
    """
    corpus, tokenizer, prefix = (os.path.join(folder, name) for name in ("sotu.jsonl.gz", "tokenizer.json", "text"))
    manifest = _whole(prefix, tokenizer)
    if manifest is not None:
        return manifest, False
    write_sotu(corpus)
    train_tokenizer_file([corpus], tokenizer, DEFAULT_VOCAB_SIZE, overwrite=True)
    options = PrepareOptions(output=prefix, tokenizer=tokenizer, workers=workers, overwrite=True, progress=progress)
    return prepare([corpus], options), True


def _whole(prefix: str, tokenizer: str) -> Manifest | None:
    try:
        manifest = verify(prefix)
    except DataError:
        return None
    if not os.path.isfile(tokenizer) or sha256_of(tokenizer) != manifest.tokenizer_sha256:
        return None
    return manifest

"""What the data of a run tell of their vocabulary: its size, its tokenizer, the token that ends their documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moepp.config.schema import Config
from moepp.data.indexed import IndexedFile
from moepp.data.manifest import sha256_of
from moepp.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """Facts that later commands and exports need; None: neither a manifest nor the configuration tells it.

    Attributes:
        size: tokens of the tokenizer, added ones included.
        eod_id: the token after every document. Manifests alone tell it: a name in a tokenizer proves nothing.
        tokenizer_sha256: of the tokenizer.json.
    """

    size: int | None
    eod_id: int | None
    tokenizer_sha256: str | None


def read_vocabulary(cfg: Config, files: Sequence[IndexedFile]) -> Vocabulary:
    """Facts about ``files``, those of ``data.paths``; they agree: :func:`moepp.data.check_data` sees to that.

    Raises:
        DataError: no manifest tells them, and the tokenizer cannot be read.
    """
    for file in files:
        if file.manifest is not None:
            manifest = file.manifest
            return Vocabulary(manifest.vocab_size, manifest.eod_id, manifest.tokenizer_sha256)
    if cfg.data.tokenizer is None:
        return Vocabulary(None, None, None)
    return Vocabulary(Tokenizer(cfg.data.tokenizer).vocab_size, None, sha256_of(cfg.data.tokenizer))


def vocabulary_remarks(cfg: Config, vocabulary: Vocabulary) -> list[str]:
    """Return the remarks about allowed but unusual vocabularies."""
    model_size = cfg.model.vocab_size
    remarks = []
    if vocabulary.size is not None and model_size > padded_size(vocabulary.size):
        remarks.append(
            f"model.vocab_size is {model_size:,} and the tokenizer has {vocabulary.size:,} tokens: the other "
            f"{model_size - vocabulary.size:,} rows of the embedding are never used; model.vocab_size="
            f"{_round_up(vocabulary.size, _STEP)} is enough"
        )
    if vocabulary.eod_id is None and cfg.data.tokenizer is not None:
        guess = Tokenizer(cfg.data.tokenizer).guess_eod()
        remarks.append(
            "no manifest says which token ends the documents of the data; "
            + (f"{guess[0]} (id {guess[1]}) is taken by its name" if guess else "samples do not stop at one")
        )
    return remarks


_STEP, _LARGE_STEP = 128, 1024


def padded_size(num_tokens: int) -> int:
    """Return the largest vocabulary that counts as the tokenizer's, padded for speed or for tensor parallelism.

    Frameworks round up to a multiple of 64 or 128, times the tensor-parallel size (at most 8 within a machine). Small
    vocabularies are rounded up to 128 only.
    """
    return _round_up(num_tokens, _STEP if num_tokens <= 8 * _LARGE_STEP else _LARGE_STEP)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step

"""A tokenizer.json (of the `tokenizers` library) with an end-of-document token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moepp.errors import DataError
from moepp.tokenizer_guard import no_panic, require_safe
from moepp.untrusted import load_json, printable, read_text

MAX_FILE_BYTES = 256 << 20  # a vocabulary of 262,144 tokens takes 33 MB
MAX_VOCAB_SIZE = 1 << 31  # token ids are kept as int32

# Names under which published tokenizers keep the token that ends a document, most specific first.
EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "<|eod|>", "</s>", "<eos>", "<|eos|>")


class Tokenizer:
    """Encode plain text and decode token ids.

    Text that spells a special token (say ``<|endoftext|>``) is encoded as ordinary text, and whatever truncation,
    padding or dropout the file asks for is switched off: they would corrupt a training corpus silently.
    """

    def __init__(self, path: str, eod_token: str | None = None, named_by: str = "data.tokenizer") -> None:
        """Load ``path``.

        Args:
            named_by: the option or configuration key that names it, for messages.
            eod_token: the token that ends a document; None: the first of ``EOD_TOKENS`` in the vocabulary.

        Raises:
            DataError: missing, unreadable, or not a tokenizer.json.
        """
        self.path = path
        self._tokenizer = _load(path, named_by)
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self._eod_candidates = EOD_TOKENS if eod_token is None else (eod_token,)
        if not self._vocabulary:
            raise DataError(f"tokenizer {path} has an empty vocabulary; train one with data_tools.train_tokenizer")
        self.vocab_size = max(self._vocabulary.values()) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise DataError(f"tokenizer {path} has the token id {self.vocab_size - 1}; ids end at {MAX_VOCAB_SIZE - 1}")

    @property
    def eod_id(self) -> int:
        """Id of the end-of-document token; errors as for :attr:`eod_token`."""
        return self._vocabulary[self.eod_token]

    @property
    def eod_token(self) -> str:
        """The end-of-document token.

        Raises:
            DataError: the vocabulary has none of the names it goes by.
        """
        for token in self._eod_candidates:
            if token in self._vocabulary:
                return token
        raise DataError(
            f"tokenizer {self.path} has no end-of-document token ({', '.join(self._eod_candidates)}); "
            "name one that it has with --eod-token, or add one"
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""
        with no_panic(self.path):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens are left out."""
        with no_panic(self.path):
            return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def to_json(self) -> str:
        """The tokenizer as JSON, truncation, padding and dropout off."""
        return self._tokenizer.to_str()


def plain(tokenizer: Any) -> Any:
    """Switch off everything that would change a corpus: truncation, padding, dropout, special tokens in the text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None  # merges left out by chance
    tokenizer.encode_special_tokens = True
    return tokenizer


def _load(path: str, named_by: str) -> Any:
    import tokenizers

    if not os.path.isfile(path):
        raise DataError(
            f"tokenizer {printable(path)} does not exist below {os.getcwd()}; check {named_by}, or write it with "
            "`moepp prepare --train-tokenizer` (demo data: `moepp prepare --demo`)"
        )
    remedy = "give a tokenizer.json of the tokenizers library"
    text = read_text(Path(path), MAX_FILE_BYTES, DataError, remedy)
    require_safe(load_json(text, f"tokenizer {path}", DataError, remedy), text, path)
    with no_panic(path, silent=True):
        try:
            return plain(tokenizers.Tokenizer.from_str(text))
        except Exception as error:  # the library raises a bare Exception for a malformed file
            reason = printable(error)
            raise DataError(
                f"tokenizer {printable(path)} is not a tokenizer.json of the tokenizers library: {reason}"
            ) from error

"""A tokenizer.json (of the `tokenizers` library) with an end-of-document token."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from moepp.errors import DataError

# Names under which published tokenizers keep the token that ends a document, most specific first.
EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "<|eod|>", "</s>", "<eos>", "<|eos|>")


class Tokenizer:
    """Encode plain text and decode token ids.

    Text that spells a special token (say ``<|endoftext|>``) is encoded as ordinary text, and whatever truncation or
    padding the file asks for is switched off: both would corrupt a training corpus silently.
    """

    def __init__(self, path: str, eod_token: str | None = None) -> None:
        """Load ``path``.

        Args:
            eod_token: the token that ends a document; None: the first of ``EOD_TOKENS`` in the vocabulary.

        Raises:
            DataError: missing, unreadable, or not a tokenizer.json.
        """
        self.path = path
        self._tokenizer = _load(path)
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self._eod_candidates = EOD_TOKENS if eod_token is None else (eod_token,)
        if not self._vocabulary:
            raise DataError(f"tokenizer {path} has an empty vocabulary; train one with data_tools.train_tokenizer")
        self.vocab_size = max(self._vocabulary.values()) + 1

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
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def to_json(self) -> str:
        """The tokenizer as JSON, truncation and padding off."""
        return self._tokenizer.to_str()


def plain(tokenizer: Any) -> Any:
    """Switch off everything that would change a corpus: truncation, padding, special tokens spelled in the text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _load(path: str) -> Any:
    import tokenizers

    if not os.path.isfile(path):
        raise DataError(
            f"tokenizer {path} does not exist below {os.getcwd()}; check data.tokenizer, or write it with "
            "`moepp prepare --train-tokenizer` (demo data: `moepp prepare --demo`)"
        )
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read()
        json.loads(text)
    except OSError as error:
        raise DataError(f"cannot read tokenizer {path}: {error.strerror}; check its permissions") from error
    except ValueError as error:
        raise DataError(f"tokenizer {path} is not JSON; give a tokenizer.json of the tokenizers library") from error
    try:
        return plain(tokenizers.Tokenizer.from_str(text))
    except Exception as error:  # the library raises a bare Exception for a malformed file
        reason = " ".join(str(error).split())
        raise DataError(f"tokenizer {path} is not a tokenizer.json of the tokenizers library: {reason}") from error

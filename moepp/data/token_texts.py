"""The text of single tokens in running text: with their blanks, special ones by name, bytes as numbers.

Decoding a token by itself drops the blank that SentencePiece tokens begin with, and turns a token that holds a part of
a character into a replacement mark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_TRIED = 10_000  # tokens among which one is sought that others can stand behind


class TokenTexts:
    """Texts of the tokens of a `tokenizers.Tokenizer`; joined, those of a sequence read as its text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        decoder = tokenizer.decoder
        tree = json.loads(decoder.__getstate__()) if decoder is not None else {}
        self._decoders = {part["type"]: part for part in tree.get("decoders", [tree]) if part}
        self._special = {
            token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }

    def of(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token; of a file without a decoder words are joined by blanks, as its decoding is."""
        texts = [self._of(token_id) for token_id in ids]
        return texts if self._decoders else [*texts[:1], *(f" {text}" for text in texts[1:])]

    def _of(self, token_id: int) -> str:
        name = self._special.get(token_id)
        if name is not None:
            return name
        name = self._tokenizer.id_to_token(token_id)
        if name is None:  # padding of the model's vocabulary
            return f"<{token_id}>"
        if "BPEDecoder" in self._decoders:  # marks the ends of words, so a token's blank stands behind it
            return name.replace(self._decoders["BPEDecoder"]["suffix"], " ")
        if not self._decoders or self._anchor is None:
            return name
        anchor_id, before = self._anchor
        text = self._tokenizer.decode([anchor_id, token_id])
        added = text[len(before) :] if text.startswith(before) else ""
        if added and _REPLACEMENT not in added:
            return added
        return _with_bytes(name) if "ByteLevel" in self._decoders else name

    @cached_property
    def _anchor(self) -> tuple[int, str] | None:
        """A token that is plain letters, and its text: what stands behind it keeps its blank."""
        for token_id in range(min(self._tokenizer.get_vocab_size(), _TRIED)):
            if token_id in self._special or self._tokenizer.id_to_token(token_id) is None:
                continue
            text = self._tokenizer.decode([token_id])
            if text.isascii() and text.isalpha():
                return token_id, text
        return None


def _with_bytes(name: str) -> str:
    """Return a byte-level token with bytes that are no whole character as <0xE2>."""
    if any(letter not in _BYTES for letter in name):  # an added token, which is spelled as it is
        return name
    text = bytes(_BYTES[letter] for letter in name).decode("utf-8", "surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in text)


def _byte_letters() -> Iterator[tuple[str, int]]:
    """Yield the letter that stands for each byte in byte-level vocabularies (GPT-2), and the byte."""
    shown = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = 0
    for byte in range(256):
        yield chr(byte if byte in shown else 256 + others), byte
        others += byte not in shown


_BYTES = dict(_byte_letters())

"""A tokenizer.json (of the `tokenizers` library) with an end-of-document token."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from moepp.data.token_texts import TokenTexts
from moepp.data.tokenizer_guard import no_panic, require_safe
from moepp.errors import DataError
from moepp.io.untrusted import load_json, printable, read_text, why_no_file

MAX_FILE_BYTES = 256 << 20  # a vocabulary of 262,144 tokens takes 33 MB
MAX_VOCAB_SIZE = 1 << 31  # token ids are kept as int32

# Names under which published tokenizers keep the token that ends a document, most specific first.
EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "<|eod|>", "</s>", "<eos>", "<|eos|>")


class Tokenizer:
    """Encode plain text and decode token ids.

    Text that spells a special token (say ``<|endoftext|>``) is encoded as ordinary text, and whatever truncation,
    padding or random dropping of merges (BPE dropout) the file asks for is switched off: all of them would corrupt a
    training corpus silently.
    """

    def __init__(
        self, path: str, eod_token: str | None = None, named_by: str = "data.tokenizer", *, eod_id: int | None = None
    ) -> None:
        """Load ``path``.

        Args:
            eod_token: the token that ends a document; None: ``eod_id``, or the first of ``EOD_TOKENS`` in the
                vocabulary.
            named_by: the option or configuration key that names it, for messages.
            eod_id: its id, where the data or a checkpoint tell it.

        Raises:
            DataError: missing, unreadable, not a tokenizer.json, or without a token of id ``eod_id``.
        """
        self.path = path
        self.named_by = named_by
        self._tokenizer = _load(path, named_by)
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self._eod_candidates = EOD_TOKENS if eod_token is None else (eod_token,)
        if not self._vocabulary:
            raise DataError(
                f"tokenizer {path} has an empty vocabulary; train one with moepp.data.prepare.train_tokenizer"
            )
        self.vocab_size = max(self._vocabulary.values()) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise DataError(f"tokenizer {path} has the token id {self.vocab_size - 1}; ids end at {MAX_VOCAB_SIZE - 1}")
        if eod_id is not None and eod_token is None:
            self._eod_candidates = (self._token_of(eod_id),)

    def _token_of(self, eod_id: int) -> str:
        token = self._tokenizer.id_to_token(eod_id) if eod_id >= 0 else None
        if token is None:
            raise DataError(
                f"tokenizer {self.path} has no token {eod_id}, with which the training data end their documents; "
                f"give the tokenizer of the data as {self.named_by}"
            )
        return token

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
        if (found := self.guess_eod()) is not None:
            return found[0]
        remedy = (
            "prepare the data with `moepp prepare`, which keeps the token of its --eod-token"
            if self.named_by == "data.tokenizer"
            else "name one that it has with --eod-token, or add one"
        )
        raise DataError(
            f"tokenizer {self.path} has no end-of-document token ({', '.join(self._eod_candidates)}); {remedy}"
        )

    def guess_eod(self) -> tuple[str, int] | None:
        """(token, id) of the end-of-document token where the vocabulary has one, else None."""
        tokens = [token for token in self._eod_candidates if token in self._vocabulary]
        return (tokens[0], self._vocabulary[tokens[0]]) if tokens else None

    def is_special(self, token_id: int) -> bool:
        """Return whether the file marks the token as special: it represents no text."""
        token = self._tokenizer.get_added_tokens_decoder().get(token_id)
        return token is not None and token.special

    def token(self, token_id: int) -> str | None:
        """Return the token with this id, as the file spells it; None where there is none."""
        return self._tokenizer.id_to_token(token_id)

    def unused_ids(self, num_ids: int) -> list[int]:
        """Ids below ``num_ids`` that no token has: padding of the model's vocabulary, and gaps."""
        used = set(self._vocabulary.values())
        return [token_id for token_id in range(num_ids) if token_id not in used]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""
        with no_panic(self.path):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of ``ids``; special tokens are left out, or stand there by name."""
        with no_panic(self.path):
            return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token in running text; see :class:`moepp.data.token_texts.TokenTexts`."""
        with no_panic(self.path):
            return self._token_texts.of(ids)

    @property
    def spelling(self) -> tuple[Callable[[Sequence[int]], str], Callable[[Sequence[int]], list[str]]]:
        """What shows tokens to people: the text of a sequence with its special tokens, and that of each token."""
        return partial(self.decode, skip_special=False), self.texts

    @cached_property
    def _token_texts(self) -> TokenTexts:
        return TokenTexts(self._tokenizer)

    def to_json(self) -> str:
        """Return the tokenizer as JSON, truncation, padding and dropout off."""
        return self._tokenizer.to_str()

    def to_plain_json(self) -> str:
        """As :meth:`to_json`, without what other libraries would add to every text: a begin token, separators.

        Encoding with special tokens then gives what :meth:`encode` gives: the tokens that training saw.
        """
        tree = json.loads(self.to_json())
        tree["post_processor"] = _without_special_tokens(tree.get("post_processor"))
        return json.dumps(tree, indent=2, ensure_ascii=False)

    @property
    def add_prefix_space(self) -> bool:
        """Whether the pre-tokeniser puts a space before the text; transformers asks for it apart from the file."""
        tree = json.loads(self.to_json()).get("pre_tokenizer") or {}
        return bool(tree.get("add_prefix_space", False))


def plain(tokenizer: Any) -> Any:
    """Switch off everything that would change a corpus: truncation, padding, dropout, special tokens in the text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None  # merges left out by chance
    tokenizer.encode_special_tokens = True
    return tokenizer


def _without_special_tokens(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a post-processor without its added tokens; it treats offsets and types of tokens as before."""
    if processor is None:
        return None
    kind = processor.get("type")
    if kind == "ByteLevel":  # trims offsets, adds nothing
        return processor
    if kind == "BertProcessing":
        return None
    if kind == "RobertaProcessing":
        kept = {key: processor[key] for key in ("add_prefix_space", "trim_offsets")}
        return {"type": "ByteLevel", **kept, "use_regex": True}
    if kind == "TemplateProcessing":
        pieces = {key: [piece for piece in processor[key] if "SpecialToken" not in piece] for key in ("single", "pair")}
        return {**processor, **pieces, "special_tokens": {}}
    if kind == "Sequence":
        parts = [_without_special_tokens(part) for part in processor["processors"]]
        kept = [part for part in parts if part is not None]
        return {**processor, "processors": kept} if kept else None
    raise DataError(f"the tokenizer's post_processor {kind!r} is not known; remove it from its file")


def _load(path: str, named_by: str) -> Any:
    import tokenizers

    if not os.path.isfile(path):
        below = "" if os.path.isabs(path) else f" below {os.getcwd()}"
        raise DataError(
            f"tokenizer {printable(path) or repr(path)} {why_no_file(path)}{below}; check {named_by}, or write it with "
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

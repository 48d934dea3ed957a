"""The text of single tokens: blanks, special tokens and parts of characters are seen, whatever the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

from moepp.analysis.token_tables import token_tables
from moepp.analysis.token_view import TokenView
from moepp.data.tokenizer import Tokenizer

SPECIAL = "</s>"
_SENTENCE_PIECE = ["\u2581the", "the", "\u2581cat", "s", "<0xE2>", "<0x82>", "<0xAC>", "\u2581", "<0x0A>"]
_LLAMA = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
_BYTES = [
    "\u0120the",
    "\u0120cat",
    "\u0120\u00e2",
    "\u0124\u00ac",
    "\u010a",
    "\u0120\u00e2\u0124\u00ac",
]
_BPE_WORDS = ["th", "e</w>", "the</w>", "cat", "s</w>"]
# \u0120 and \u2581 stand for blanks. Name -> (model, vocabulary, decoder, tokens of a text, their texts)
CASES: dict[str, tuple[Any, list[str], Any, list[str], list[str]]] = {
    "bytes": (
        models.BPE,
        [
            "!",
            "the",
            "\u0120the",
            "\u0120cat",
            "s",
            "\u0120\u00e2",
            "\u0124\u00ac",
            "\u010a",
            "\u0120\u00e2\u0124\u00ac",
        ],
        decoders.ByteLevel(),
        [
            "the",
            "\u0120cat",
            "s",
            "\u010a",
            SPECIAL,
            "\u0120the",
            "\u0120\u00e2",
            "\u0124\u00ac",
            "\u0120\u00e2\u0124\u00ac",
        ],
        ["the", " cat", "s", "\n", SPECIAL, " the", " <0xE2>", "<0x82><0xAC>", " \u20ac"],
    ),
    "metaspace": (
        models.BPE,
        _SENTENCE_PIECE,
        decoders.Metaspace(),
        ["\u2581the", "\u2581cat", "s", SPECIAL, "\u2581the", "the", "\u2581"],
        [" the", " cat", "s", SPECIAL, " the", "the", " "],
    ),
    "llama": (
        models.BPE,
        _SENTENCE_PIECE,
        decoders.Sequence(_LLAMA),
        ["\u2581the", "\u2581cat", "s", "<0x0A>", SPECIAL, "\u2581the", "<0xE2>", "<0x82>", "<0xAC>", "\u2581"],
        [" the", " cat", "s", "\n", SPECIAL, " the", "<0xE2>", "<0x82>", "<0xAC>", " "],
    ),
    "word pieces": (
        models.WordPiece,
        ["the", "##the", "cat", "##s", ".", "[UNK]"],
        decoders.WordPiece(),
        ["the", "cat", "##s", ".", SPECIAL, "##the"],
        [" the", " cat", "s", ".", SPECIAL, "the"],
    ),
    "ends of words": (
        models.BPE,
        _BPE_WORDS,
        decoders.BPEDecoder("</w>"),
        ["th", "e</w>", "cat", "s</w>", SPECIAL, "the</w>"],
        ["th", "e ", "cat", "s ", SPECIAL, "the "],
    ),
    "words": (
        models.WordLevel,
        ["the", "cat", "[UNK]"],
        None,
        ["the", "cat", "the", SPECIAL],
        ["the", " cat", " the", f" {SPECIAL}"],
    ),
}


def make(path: Path, name: str) -> Tokenizer:
    kind, tokens, decoder, *_ = CASES[name]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    options = {"merges": []} if kind is models.BPE else {"unk_token": "[UNK]"}
    library: Any = Library(kind(vocab=vocabulary, **options))
    library.add_special_tokens([SPECIAL])
    if decoder is not None:
        library.decoder = decoder
    library.save(str(path / "tokenizer.json"))
    return Tokenizer(str(path / "tokenizer.json"))


@pytest.mark.parametrize("name", CASES)
def test_blanks_special_tokens_and_parts_of_characters_are_seen(tmp_path, name):
    tokenizer = make(tmp_path, name)
    *_, tokens, wanted = CASES[name]
    assert tokenizer.texts([tokenizer._vocabulary[token] for token in tokens]) == wanted
    number = len(tokenizer._vocabulary)
    alone = [tokenizer.texts([token_id])[0] for token_id in range(number)]
    assert all(alone) and len(set(alone)) == number, "no type is called like another"
    assert tokenizer.texts([number + 5])[0] == f"<{number + 5}>", "padding of the model's vocabulary"


@pytest.mark.parametrize("name", CASES)
def test_joined_they_read_as_the_text(tmp_path, name):
    tokenizer = make(tmp_path, name)
    *_, tokens, _ = CASES[name]
    ids = [tokenizer._vocabulary[token] for token in tokens[:3]]
    assert "".join(tokenizer.texts(ids)).strip() == tokenizer.decode(ids)
    ids.append(tokenizer._vocabulary[SPECIAL])
    assert tokenizer.decode(ids).strip() == tokenizer.decode(ids[:3])
    assert tokenizer.decode(ids, skip_special=False).endswith(SPECIAL)


def test_tables_of_tokens_show_types_and_a_text_with_their_blanks(tmp_path):
    tokenizer = make(tmp_path, "llama")
    number, end = tokenizer._vocabulary, tokenizer._vocabulary[SPECIAL]
    ids = np.array(
        [[number["\u2581the"], number["\u2581cat"], number["s"], end, number["the"], number["\u2581cat"]] * 5]
    )
    view = TokenView(ids, np.ones(ids.shape), np.ones(ids.shape), {"ffn": np.ones(1)})
    tables = token_tables({"a": view}, *tokenizer.spelling)
    assert "".join(row["text"] for row in tables["text"][:6]) == " the cats</s>the cat"
    assert sorted(row["text"] for row in tables["types"]) == sorted([" the", "the", " cat", "s", SPECIAL])
    [last] = [row for row in tables["types"] if row["token"] == end]
    assert last["examples"][0] == "the cats</s>"

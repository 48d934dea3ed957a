"""What a tokenizer cannot represent: characters without a token, and those that became the unknown token.

Byte-level tokenizers and those that fall back to bytes lose nothing, which their file shows; with all others every
document is measured: by the spans of text of its tokens, or character by character where a tokenizer
drops some without a trace. White space does not count: many tokenizers
leave it out on purpose. Changes that normalizers make (lower case, accents in another form) do not count either.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

KEPT_SAMPLES = 1_000  # different lost characters that are counted apart
HARMLESS_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "ByteLevel"}


@dataclass
class Losses:
    """Counts over documents."""

    characters: int = 0  # without white space
    lost_characters: int = 0
    unknown_tokens: int = 0
    samples: Counter[str] = field(default_factory=Counter)  # the lost characters

    @property
    def share(self) -> float:
        """Lost characters as a share of all."""
        return self.lost_characters / max(self.characters, 1)

    def add(self, other: Losses) -> None:
        self.characters += other.characters
        self.lost_characters += other.lost_characters
        self.unknown_tokens += other.unknown_tokens
        for character, count in other.samples.items():
            if character in self.samples or len(self.samples) < KEPT_SAMPLES:
                self.samples[character] += count


class LossMeter:
    """Measures the documents of one tokenizer.

    Attributes:
        needs_offsets: whether encodings must come with offsets, which ``encode_batch_fast`` leaves out.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        model = json.loads(tokenizer.to_str())["model"]
        self._unknown_id = _unknown_id(tokenizer, model)
        # BPE without an unknown token drops characters, and its offsets are wrong behind the first of them.
        self._drops = model.get("type") == "BPE" and self._unknown_id is None
        self._kept: dict[str, bool] = {}  # characters, for a tokenizer that drops some
        self.needs_offsets = not self._drops

    def __call__(self, text: str, encoding: Any) -> Losses:
        """Losses of one document."""
        characters = len(text) - sum(map(str.isspace, text))
        if self._drops:
            counts = Counter(text)
            self._learn([character for character in counts if character not in self._kept])
            samples = Counter({c: n for c, n in counts.items() if not self._kept[c] and not c.isspace()})
            return Losses(characters, samples.total(), 0, samples)
        offsets_T2 = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        known_T = np.array(encoding.ids, dtype=np.int64) != (-1 if self._unknown_id is None else self._unknown_id)
        edges = np.zeros(len(text) + 1, dtype=np.int64)
        np.add.at(edges, offsets_T2[known_T, 0], 1)
        np.add.at(edges, offsets_T2[known_T, 1], -1)
        uncovered = np.flatnonzero(np.cumsum(edges)[: len(text)] == 0).tolist()
        samples = Counter(text[i] for i in uncovered if not text[i].isspace())
        return Losses(characters, samples.total(), int((~known_T).sum()), samples)

    def _learn(self, characters: list[str]) -> None:
        """Find out which characters, each by itself, have tokens, and tokens of all their bytes."""
        encodings = self._tokenizer.encode_batch_fast(characters, add_special_tokens=False)
        for character, encoding in zip(characters, encodings, strict=True):
            torn = "\ufffd" in self._tokenizer.decode(encoding.ids) and character != "\ufffd"
            self._kept[character] = bool(encoding.ids) and not torn


def _unknown_id(tokenizer: Any, model: dict[str, Any]) -> int | None:
    """Id of the model's unknown token."""
    if isinstance(model.get("unk_id"), int):  # Unigram
        return model["unk_id"]
    token = model.get("unk_token")
    return tokenizer.token_to_id(token) if isinstance(token, str) else None


def can_lose(tokenizer_json: str) -> bool:
    """Return whether a tokenizer may have no token for some character; where its file does not show it, True."""
    tree = json.loads(tokenizer_json)
    normalizers, splitters = _steps(tree.get("normalizer")), _steps(tree.get("pre_tokenizer"))
    for step in normalizers:
        replaces_text = step["type"] == "Replace" and step.get("content") and "String" in step.get("pattern", {})
        if step["type"] not in HARMLESS_NORMALIZERS and not replaces_text:
            return True
    if any(step.get("behavior") == "Removed" or step["type"] == "CharDelimiterSplit" for step in splitters):
        return True
    model = tree["model"]
    if model.get("type") != "BPE":
        return True
    vocabulary = model["vocab"]
    if model.get("byte_fallback"):
        return any(f"<0x{byte:02X}>" not in vocabulary for byte in range(256))
    if not any(step["type"] == "ByteLevel" for step in normalizers + splitters):
        return True
    from tokenizers.pre_tokenizers import ByteLevel

    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    return bool(affixes) or any(letter not in vocabulary for letter in ByteLevel.alphabet())


def _steps(tree: Any) -> list[dict[str, Any]]:
    if not isinstance(tree, dict):
        return []
    inner = tree.get("normalizers") if "normalizers" in tree else tree.get("pretokenizers")
    return [step for item in inner for step in _steps(item)] if isinstance(inner, list) else [tree]

"""What a tokenizer cannot represent: characters without a token, and those that became the unknown token.

Byte-level tokenizers and those that fall back to bytes lose nothing, which their file shows; with all others every
document is measured, by the spans of text that its tokens stand for. White space does not count: many tokenizers
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


def measure(text: str, encoding: Any, unknown_id: int | None) -> Losses:
    """Losses of one document.

    Args:
        encoding: of the tokenizers library, with offsets (which ``encode_batch_fast`` leaves out).
        unknown_id: id of the unknown token, if there is one.
    """
    length = len(text)
    offsets_T2 = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    ids_T = np.array(encoding.ids, dtype=np.int64)
    known_T = np.ones(len(ids_T), dtype=bool) if unknown_id is None else ids_T != unknown_id
    edges = np.zeros(length + 1, dtype=np.int64)
    np.add.at(edges, offsets_T2[known_T, 0], 1)
    np.add.at(edges, offsets_T2[known_T, 1], -1)
    lost = [text[i] for i in np.flatnonzero(np.cumsum(edges)[:length] == 0).tolist() if not text[i].isspace()]
    characters = length - sum(map(str.isspace, text))
    return Losses(characters, len(lost), int((~known_T).sum()), Counter(lost))


def unknown_id(tokenizer: Any) -> int | None:
    """Id of the model's unknown token."""
    model = json.loads(tokenizer.to_str())["model"]
    if isinstance(model.get("unk_id"), int):  # Unigram
        return model["unk_id"]
    token = model.get("unk_token")
    return tokenizer.token_to_id(token) if isinstance(token, str) else None


def can_lose(tokenizer_json: str) -> bool:
    """Whether a tokenizer may have no token for some character; where its file does not show it, True."""
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

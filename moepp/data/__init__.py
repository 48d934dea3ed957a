"""Megatron indexed datasets behind a deterministic, resumable loader."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moepp.data.check import check_data
    from moepp.data.loader import Data, build_data
    from moepp.data.tokenizer import Tokenizer
    from moepp.data.vocabulary import Vocabulary, read_vocabulary, vocabulary_remarks

__all__ = ["Data", "Tokenizer", "Vocabulary", "build_data", "check_data", "read_vocabulary", "vocabulary_remarks"]

# Looked up when first asked for: the workers of moepp.data.prepare import no torch.
_HOMES = {"check_data": "check", "Data": "loader", "build_data": "loader", "Tokenizer": "tokenizer"} | dict.fromkeys(
    ("Vocabulary", "read_vocabulary", "vocabulary_remarks"), "vocabulary"
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"moepp.data.{_HOMES[name]}"), name)

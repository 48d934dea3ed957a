"""Megatron indexed datasets behind a deterministic, resumable loader."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moepp.data.check import check_data
    from moepp.data.corpora import Corpora, open_corpora
    from moepp.data.loader import Data, build_data
    from moepp.data.tokenizer import Tokenizer
    from moepp.data.vocabulary import Vocabulary, vocabulary_remarks

__all__ = [
    "Corpora",
    "Data",
    "Tokenizer",
    "Vocabulary",
    "build_data",
    "check_data",
    "open_corpora",
    "vocabulary_remarks",
]

# Looked up when first asked for: the workers of moepp.data.prepare import no torch.
_HOMES = {
    "Corpora": "corpora",
    "Data": "loader",
    "Tokenizer": "tokenizer",
    "Vocabulary": "vocabulary",
    "build_data": "loader",
    "check_data": "check",
    "open_corpora": "corpora",
    "vocabulary_remarks": "vocabulary",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"moepp.data.{_HOMES[name]}"), name)

"""Megatron indexed datasets behind a deterministic, resumable loader."""

from moepp.data.check import check_data
from moepp.data.loader import Data, build_data
from moepp.data.tokenizer import Tokenizer
from moepp.data.vocabulary import Vocabulary, read_vocabulary, vocabulary_remarks

__all__ = ["Data", "Tokenizer", "Vocabulary", "build_data", "check_data", "read_vocabulary", "vocabulary_remarks"]

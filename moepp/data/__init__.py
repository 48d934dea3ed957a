"""Megatron indexed datasets behind a deterministic, resumable loader."""

from moepp.data.check import check_data
from moepp.data.loader import Data, build_data
from moepp.data.tokenizer import Tokenizer

__all__ = ["Data", "Tokenizer", "build_data", "check_data"]

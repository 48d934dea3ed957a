"""The decoder around the MoE++ layers: model, initialisation, accounting, sampling."""

from moepp.model.attention import KVCache
from moepp.model.cross_entropy import chunked_cross_entropy
from moepp.model.generate import generate
from moepp.model.init import init_parameters
from moepp.model.transformer import LossOutput, ModelOutput, Transformer

__all__ = [
    "KVCache",
    "LossOutput",
    "ModelOutput",
    "Transformer",
    "chunked_cross_entropy",
    "generate",
    "init_parameters",
]

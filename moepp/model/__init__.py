"""The decoder around the MoE++ layers: model, initialisation, accounting, sampling."""

from moepp.model.attention import KVCache
from moepp.model.generate import generate
from moepp.model.init import init_parameters
from moepp.model.transformer import LossOutput, ModelOutput, Transformer

__all__ = [
    "KVCache",
    "LossOutput",
    "ModelOutput",
    "Transformer",
    "generate",
    "init_parameters",
]

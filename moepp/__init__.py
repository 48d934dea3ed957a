"""MoE++ pretraining: mixture-of-experts layers with zero-computation experts, and everything to train them."""

from moepp.config import MoEConfig
from moepp.moe import MoELayer, MoEOutput, MoEStats

__version__ = "0.1.0"
__all__ = ["MoEConfig", "MoELayer", "MoEOutput", "MoEStats", "__version__"]

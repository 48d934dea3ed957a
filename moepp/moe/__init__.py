"""The MoE++ layer (arXiv 2410.07348)."""

from moepp.moe.layer import MoELayer, MoEOutput
from moepp.moe.parallel import ExpertParallel
from moepp.moe.stats import MoEStats

__all__ = ["ExpertParallel", "MoELayer", "MoEOutput", "MoEStats"]

"""The MoE++ layer and its parts."""

from moepp.moe.layer import MoELayer, MoEOutput, MoEStats

__all__ = ["MoELayer", "MoEOutput", "MoEStats"]

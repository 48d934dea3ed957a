"""The experts: FFN experts, which are sharded, and zero-computation experts, which every rank holds."""

from moepp.moe.experts.ffn import FFNExperts
from moepp.moe.experts.zero_computation import ExpertKind, ZeroComputation

__all__ = ["ExpertKind", "FFNExperts", "ZeroComputation"]

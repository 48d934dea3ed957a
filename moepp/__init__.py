"""MoE++ pretraining: mixture-of-experts layers with zero-computation experts, and everything to train them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import moepp.cpu  # noqa: F401  # sets variables that torch reads once, when it is imported

if TYPE_CHECKING:
    from moepp.config import MoEConfig
    from moepp.interop import official
    from moepp.moe import MoELayer, MoEOutput, MoEStats

__version__ = "0.1.0"
__all__ = ["MoEConfig", "MoELayer", "MoEOutput", "MoEStats", "__version__", "official"]

# Looked up when first asked for: the layer imports torch, which takes seconds, and `moepp --help` needs none of it.
_HOMES = {"MoEConfig": "moepp.config"} | dict.fromkeys(("MoELayer", "MoEOutput", "MoEStats"), "moepp.moe")


def __getattr__(name: str) -> Any:
    if name == "official":  # released checkpoints
        return importlib.import_module("moepp.interop.official")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

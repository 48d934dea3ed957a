"""Metrics: values that carry their reduction over ranks, and the places that records go to.

A leaf: it calls neither the trainer nor the engines, and no collective (reductions are passed in).
"""

from moepp.metrics.logs import close_logging, setup_logging
from moepp.metrics.sinks import Sink, SinkGroup, open_sinks
from moepp.metrics.step_stats import StepStats
from moepp.metrics.throughput import Throughput, peak_flops_per_second
from moepp.metrics.values import Value, reduce_values
from moepp.metrics.wandb import require_wandb_login, require_wandb_settings

__all__ = [
    "Sink",
    "SinkGroup",
    "StepStats",
    "Throughput",
    "Value",
    "close_logging",
    "open_sinks",
    "peak_flops_per_second",
    "reduce_values",
    "require_wandb_login",
    "require_wandb_settings",
    "setup_logging",
]

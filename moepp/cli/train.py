"""Train a model, on one process, or on many under torchrun or deepspeed (there: train.py); `-m` sweeps over values.

The keys are those of configs/, as for train.py.
"""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLE = "moepp train experiment=moepp_0.6b train.steps=1000"


def main(arguments: Sequence[str]) -> int:
    """Train as the arguments say; what goes wrong ends the process with train.py's exit codes."""
    from moepp.training.main import main as train

    train(arguments)
    return 0

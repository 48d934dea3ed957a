"""Megatron-core's datasets come without its layers and torch's compiler; whoever wants the rest still gets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import sys
from moepp.data import megatron as ours
heavy = ("torch._inductor", "torch._dynamo", "megatron.core.tensor_parallel", "megatron.core.transformer")
assert not (found := [name for name in heavy if name in sys.modules]), found
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset
assert GPTDataset is ours.GPTDataset and not any(name in sys.modules for name in heavy)

import megatron.core
from megatron.core import ModelParallelConfig, parallel_state
assert megatron.core.mpu is parallel_state and megatron.core.ModelParallelConfig is ModelParallelConfig
assert megatron.core.tensor_parallel.ColumnParallelLinear and type(megatron.core).__name__ == "module"
assert not hasattr(megatron.core, "nothing")
from megatron.core.datasets.gpt_dataset import GPTDataset as again
assert again is GPTDataset
"""


def test_datasets_are_imported_alone_and_the_rest_when_it_is_wanted():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

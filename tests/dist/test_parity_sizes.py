"""At real sizes the numbers do not depend on the layout either: sums over millions of gradients must be right.

Toy models cannot show this: float32 sums lose small terms only after large ones, and only where there are many.
The gradient norm is also compared with an oracle, a float64 sum over all gradients of one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch

from moepp.engine import native
from moepp.model.accounting import count_parameters
from tests.parity import REFERENCE, Deviation, Layout, Setting, deviation, make_config, train

NORM_TOLERANCE = 1e-6  # relative
LOSS_TOLERANCE = 1e-5

# Learning rates as in training: larger ones make a run of this size leap, and rounding errors with it.
_OPTIM = (("lr", 2e-3), ("min_lr", 2e-4))
_MODEL = (("init_std", 0.02), ("num_kv_heads", 2))
_MOE = (("ffn_hidden_size", 512), ("tau", 0.75), ("balance_loss_weight", 0.01), ("z_loss_weight", 0.0))
# configs/model/tiny.yaml: 17.6 million parameters.
DEMO = (("vocab_size", 8192), ("hidden_size", 256), ("num_layers", 4), ("num_heads", 4), *_MODEL)
# 17.2 million parameters, 16.8 of them in embedding and output matrix.
EMBEDDING_HEAVY = (("vocab_size", 65536), ("hidden_size", 128), ("num_layers", 1), ("num_heads", 2), *_MODEL)
SIZES = {
    "demo": Setting("adamw", grad_clip=0.5, model=DEMO, moe=_MOE, optim=_OPTIM, steps=4),
    "embedding-heavy": Setting(
        "adamw", grad_clip=0.5, model=EMBEDDING_HEAVY, moe=(*_MOE, ("ffn_hidden_size", 128)), optim=_OPTIM, steps=4
    ),
}
LAYOUTS = [Layout(1, 1, "deepspeed", 1), Layout(2, 2, "native"), Layout(2, 2, "deepspeed", 2, micro_batch=2)]


def _plain_squared_norm(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.double().square().sum()


@contextlib.contextmanager
def _sums(function: Any) -> Iterator[None]:
    """Sum the squares of each gradient by ``function``."""
    with patch.object(native, "squared_norms", lambda tensors, device: torch.stack([function(x) for x in tensors])):
        yield


def float64_sums(model: Any, groups: Any) -> Any:
    return _sums(_plain_squared_norm)


def float32_sums_over_long_parts(model: Any, groups: Any) -> Any:
    def wrong(gradient: torch.Tensor) -> torch.Tensor:
        parts = [torch.linalg.vector_norm(part) for part in gradient.split(2**22)]
        return torch.stack(parts).double().square().sum()

    return _sums(wrong)


@pytest.fixture(scope="module", params=SIZES)
def compare(pools: Any, request: pytest.FixtureRequest) -> Callable[..., Deviation]:
    """``compare(layout, *sabotage)``: how far a layout is from one process whose norms are plain float64 sums."""
    setting = SIZES[request.param]
    wanted = pools(1).run(train, setting, REFERENCE, float64_sums)[0]
    return lambda layout, *sabotage: deviation(wanted, pools(layout.ranks).run(train, setting, layout, *sabotage)[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_numbers_of_a_real_size_are_those_of_one_process_with_float64_sums(compare, layout):
    found = compare(layout)
    assert found.grad_norm < NORM_TOLERANCE and found.worst < LOSS_TOLERANCE, found


def test_float32_sums_over_long_parts_are_noticed(compare):
    found = compare(REFERENCE, float32_sums_over_long_parts)
    assert found.grad_norm > 3 * NORM_TOLERANCE, found


def test_sizes_are_real():
    counts = {name: count_parameters(make_config(setting, REFERENCE).model) for name, setting in SIZES.items()}
    assert counts["demo"].total == 17_584_960  # what `python train.py` says of the demo
    assert counts["embedding-heavy"].total - counts["embedding-heavy"].ffn_experts > 16_000_000

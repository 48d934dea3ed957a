"""How often the host waits for the device in an optimizer step, beside the layers."""

from __future__ import annotations

import pytest

from moepp.distributed import comm
from moepp.ops import use_grouped_products, use_kernels
from moepp.training.trainer import Trainer
from tests.host_waits import counted_waits
from tests.parity import Layout, Setting, train

READS = ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")


def _waits_of_a_step(rank: int, ep: int, micro_batch: int, zero: int) -> tuple[int, int, dict[str, int]]:
    found: list[tuple[int, int, dict[str, int]]] = []

    def inspect(trainer: Trainer) -> None:
        layers = trainer.parts.model.routers
        for router in layers:
            router._forward_hooks.clear()  # of the history, which read values
        batches = trainer.batches.read(0, False)  # in the host's memory
        with pytest.MonkeyPatch.context() as patch, use_kernels("torch"), use_grouped_products():
            patch.setattr(comm, "host_reads_at_once", lambda tensor: False)
            patch.setattr(trainer.batches, "read", lambda *_: batches)
            with counted_waits(patch) as waits:
                trainer.train_step()
            reads = {name: count for name, count in waits.items() if name in READS}
        found.append((len(layers), len(batches), reads))

    setting = Setting("sgd", moe=(("balance_loss_scope", "data_parallel"),), steps=2)
    train(rank, setting, Layout(comm.size(), ep, micro_batch=micro_batch, zero=zero), inspect=inspect)
    return found[0]


@pytest.mark.parametrize(("ep", "zero"), [(1, 0), (2, 0), (1, 1)])
def test_a_step_waits_for_its_losses_and_for_its_gradient_norm(pool_2, ep, zero):
    for layers, micro_batches, reads in pool_2.run(_waits_of_a_step, ep, 2, zero):
        assert layers > 0 and micro_batches == 2
        in_layers = layers * micro_batches if ep > 1 else 0  # sizes of the blocks of the exchange
        on_cpu_alone = micro_batches + 1  # labels before the loss; whether the logged norms of the weights are finite
        assert reads == {"tolist": 1 + in_layers, "__float__": 1, "__bool__": on_cpu_alone}

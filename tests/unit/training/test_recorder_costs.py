"""What a record costs, in operations, waits of the host, collectives and bytes: as many whatever the model's depth."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from moepp.bench import layouts
from moepp.bench.metrics import BETWEEN, NOTHING, RECORDS, Options, make_steps
from moepp.bench.peers import one_process_group
from moepp.distributed import comm
from moepp.engine import native
from moepp.engine.norms import squared_norms_at_once
from moepp.metrics import norms
from moepp.ops import use_kernels
from tests.host_waits import counted_waits
from tests.launches import Launches

CPU = torch.device("cpu")
READS = ("tolist", "item", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
COLLECTIVES = [name for name in dir(comm) if name.startswith(("all_", "start_all_", "start_reduce_", "agree_"))]
FEW, MANY = 2, 4  # layers
Costs = dict[str, tuple[int, Counter[str], int, int]]
"""By way of measuring: operations, reads of the host, collectives, bytes written."""


def measure(num_layers: int, folder: Path, patch: pytest.MonkeyPatch) -> Costs:
    """Return what a step costs, as on an accelerator: all norms at once."""
    shape = layouts.Options(
        num_layers=num_layers,
        hidden_size=16,
        ffn_hidden_size=8,
        vocab_size=32,
        seq_len=8,
        global_batch_size=2,
        dtype="fp32",
    )
    for module, name in ((native, "squared_norms"), (norms, "rough_squared_norms")):
        patch.setattr(module, name, lambda tensors, _device: squared_norms_at_once(tensors))
    calls: Counter[str] = Counter()
    originals = {name: getattr(comm, name) for name in COLLECTIVES}
    for name in COLLECTIVES:

        def counted(*args: Any, _name: str = name, **kwargs: Any) -> Any:
            calls[_name] += 1
            return originals[_name](*args, **kwargs)

        patch.setattr(comm, name, counted)
    found: Costs = {}
    with one_process_group(CPU), use_kernels("torch"):
        steps = make_steps(Options(shape, CPU, kernels="torch"), folder)
        for name, step in steps.items():
            step()  # finds places and makes what is kept
            calls.clear()
            size = written(folder / name)
            with counted_waits(patch) as waits, Launches() as launches:
                step()
            reads = Counter({read: count for read, count in waits.items() if read in READS})
            found[name] = launches.by_name.total(), reads, calls.total(), written(folder / name) - size
    return found


def written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Costs]:
    found = {}
    for num_layers in (FEW, MANY):
        with pytest.MonkeyPatch.context() as patch:
            found[num_layers] = measure(num_layers, tmp_path_factory.mktemp("costs"), patch)
    return found


def more(costs: Costs, name: str, than: str) -> tuple[int, Counter[str], int]:
    """Return by how much a way of measuring costs more operations, reads and collectives than another."""
    operations, reads, collectives, _ = costs[name]
    other_operations, other_reads, other_collectives, _ = costs[than]
    assert not other_reads - reads
    return operations - other_operations, reads - other_reads, collectives - other_collectives


def test_a_step_between_records_waits_for_nothing_and_adds_as_few_operations_at_any_depth(costs):
    few, many = (more(costs[num_layers], BETWEEN, NOTHING) for num_layers in (FEW, MANY))
    assert few == many and few[0] <= 32
    assert not few[1] and few[2] == 0
    assert costs[MANY][BETWEEN][3] == 0


@pytest.mark.parametrize("name", RECORDS.values())
def test_a_record_takes_one_collective_and_one_copy_to_the_host_at_any_depth(costs, name):
    (few, few_reads, few_collectives), (many, many_reads, many_collectives) = (
        more(costs[num_layers], name, BETWEEN) for num_layers in (FEW, MANY)
    )
    assert few_collectives == many_collectives == 1
    assert few_reads == many_reads and few_reads["cpu"] == 1  # what else is read is of the host by then
    in_a_layer = (many - few) / (MANY - FEW)
    assert in_a_layer <= 10  # gates without the residual: one kernel where there are compiled ones
    assert few - FEW * in_a_layer <= 55


def test_what_a_record_writes_grows_with_the_layers_where_it_is_detailed_alone(costs):
    brief, detailed = RECORDS.values()
    in_a_layer = {name: (costs[MANY][name][3] - costs[FEW][name][3]) / (MANY - FEW) for name in (brief, detailed)}
    snapshot = 900  # of routing.jsonl, which keeps every layer
    assert in_a_layer[brief] <= snapshot and in_a_layer[detailed] - in_a_layer[brief] <= 24 * 50
    assert costs[FEW][brief][3] - FEW * in_a_layer[brief] <= 3_000

"""Layouts that do not fit the ranks, the model or the batch are refused with one that would."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest

from moepp.config import from_dict, make_plan, to_dict, validate
from moepp.config.parallel_rules import sequence_multiple
from moepp.config.stages import split_layers
from moepp.distributed.sequence import SequenceParallel
from moepp.errors import ConfigError
from tests.parity import Layout, Setting, make_config


def config(**changes: Any) -> Any:
    """4 layers, 4 query and 2 key/value heads, 8 experts, 8 sequences of 16 tokens; ``section__key=value`` changes."""
    tree = to_dict(make_config(Setting(model=(("num_layers", 4), ("num_heads", 4), ("num_kv_heads", 2))), Layout()))
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = tree
        for parent in parents:
            place = place[parent]
        place[key] = value
    return from_dict(tree)


def parallel(**keys: Any) -> dict[str, Any]:
    return {f"parallel__{key}": value for key, value in keys.items()}


INTERLEAVED = {"pipeline_schedule": "interleaved", "pipeline_chunks": 2}
REFUSED = [
    (6, parallel(pipeline=4), ["parallel.pipeline=4 does not divide the 6 processes", "start 8 processes"]),
    (4, parallel(pipeline=2, tensor=4), ["parallel.pipeline=2 x parallel.tensor=4 = 8", "the 4 processes", "start 8"]),
    (
        4,
        parallel(pipeline=2, expert=4),
        ["parallel.expert=4 does not divide the 2 processes of a pipeline stage", "parallel.expert=2 would work"],
    ),
    (3, parallel(expert=3), ["num_ffn_experts=8", "parallel.expert=1 would work"]),
    (8, parallel(pipeline=8), ["8 stages need a layer each and model.num_layers=4", "lower parallel.pipeline to 4"]),
    (
        4,
        parallel(pipeline=4, **INTERLEAVED),
        ["parallel.pipeline=4 x parallel.pipeline_chunks=2 = 8 stages", "lower parallel.pipeline to 2"],
    ),
    (2, parallel(pipeline=2, pipeline_chunks=2), ["needs parallel.pipeline_schedule=interleaved, and it is 1f1b"]),
    (
        2,
        parallel(pipeline=2, pipeline_schedule="interleaved"),
        ["parallel.pipeline_chunks=1; set parallel.pipeline_chunks=2"],
    ),
    (2, parallel(pipeline_schedule="interleaved"), ["parallel.pipeline_schedule=interleaved needs a pipeline"]),
    (2, parallel(pipeline_chunks=2), ["parallel.pipeline_chunks=2 needs a pipeline and parallel.pipeline=1"]),
    (2, parallel(pipeline_layers=[4]), ["parallel.pipeline_layers=[4] needs a pipeline"]),
    (2, parallel(pipeline=2, pipeline_layers=[4]), ["2 numbers", "sum to model.num_layers=4", "for example [2, 2]"]),
    (2, parallel(pipeline=2, pipeline_layers=[1, 2]), ["parallel.pipeline_layers=[1, 2]", "for example [2, 2]"]),
    (
        2,
        parallel(pipeline=2) | {"model__tie_embeddings": True},
        ["tie_embeddings=true", "set model.tie_embeddings=false"],
    ),
    (2, parallel(pipeline=2) | {"train__samples": 1}, ["train.samples=1", "moepp generate"]),
    (
        2,
        parallel(pipeline=2) | {"eval__tasks": ["piqa"], "data__tokenizer": "t.json"},
        ["eval.tasks=['piqa']", "moepp eval"],
    ),
    (2, parallel(pipeline=2) | {"engine__name": "deepspeed"}, ["parallel.pipeline=2", "use engine=native"]),
    (2, parallel(tensor=2) | {"engine__name": "deepspeed"}, ["parallel.tensor=2", "use engine=native"]),
    (2, parallel(context=2) | {"engine__name": "deepspeed"}, ["parallel.context=2", "use engine=native"]),
    (4, parallel(tensor=4), ["parallel.tensor=4 does not divide model.num_kv_heads=2", "parallel.tensor of 2 would"]),
    (
        4,
        parallel(tensor=2, context=2),
        ["parallel.tensor=2 x parallel.context=2 (ulysses)", "num_kv_heads=2", "context_method=gather"],
    ),
    (
        2,
        parallel(tensor=2) | {"data__seq_len": 15},
        ["data.seq_len=15 is not a multiple of 2", "seq_len=14 would"],
    ),
    (
        4,
        parallel(context=4, context_method="gather") | {"data__seq_len": 12},
        ["data.seq_len=12 is not a multiple of 8", "parallel.context=4 (gather)", "data.seq_len=8 would work"],
    ),
    (
        4,
        parallel(context=2, tensor=2, context_method="gather") | {"data__seq_len": 14},
        ["data.seq_len=14 is not a multiple of 4", "data.seq_len=12 would work"],
    ),
    (1, parallel(context_method="gather"), ["context_method=gather needs", "parallel.context=1", "leave parallel.con"]),
    (2, parallel(tensor=2, context_method="gather"), ["context_method=gather needs", "raise parallel.context"]),
    (
        4,
        parallel(pipeline=4) | {"train__micro_batch_size": 4},
        ["gives 2 micro-batches", "parallel.pipeline=4 needs at least", "train.global_batch_size=16 would work"],
    ),
    (
        2,
        parallel(pipeline=2, **INTERLEAVED) | {"train__global_batch_size": 7},
        ["gives 7 micro-batches", "a multiple of parallel.pipeline=2", "train.global_batch_size=8 would work"],
    ),
    (4, parallel(pipeline=2) | {"train__global_batch_size": 7}, ["micro_batch_size 1 x 2 replicas", "multiple of 2"]),
]


@pytest.mark.parametrize(("world_size", "changes", "parts"), REFUSED)
def test_layout_that_cannot_work_is_refused_with_one_that_would(world_size, changes, parts):
    with pytest.raises(ConfigError) as caught:
        validate(config(**changes), world_size)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_a_sequence_is_refused_exactly_where_it_cannot_be_cut_into_equal_parts():
    """12 tokens over two context and two tensor ranks: four runs of 3, and 3 for each rank."""
    validate(config(**parallel(context=2, tensor=2, context_method="gather"), data__seq_len=12), 4)
    for method, context, tensor in itertools.product(("ulysses", "gather"), (1, 2, 3, 4), (1, 2, 3, 4)):
        sizes = {"context_size": context, "tensor_size": tensor}
        sequence = type("Ranks", (SequenceParallel,), sizes)(method=method)
        runs = 2 * context if method == "gather" and context > 1 else context
        for seq_len in range(1, 49):
            fits = seq_len % runs == 0 and seq_len // context % tensor == 0
            assert fits == (seq_len % sequence_multiple(method, context, tensor) == 0)
            with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match="make it a multiple of"):
                parts = [sequence.context_positions(seq_len, rank).tolist() for rank in range(context)]
                assert sorted(itertools.chain(*parts)) == list(range(seq_len)) and len(set(map(len, parts))) == 1


def test_batch_is_split_over_replicas():
    cfg = config(**parallel(pipeline=2, tensor=2))
    plan = make_plan(cfg, 8)
    assert (plan.data_size, plan.micro_batch_size, plan.accumulation_steps) == (2, 1, 4)
    assert plan.tokens_per_step == 8 * 16
    assert plan.stage_layers == (range(2), range(2, 4))
    assert make_plan(config(), 8).stage_layers == (range(4),)


def test_layers_are_split_evenly_or_as_given():
    assert split_layers(8, 4) == (range(2), range(2, 4), range(4, 6), range(6, 8))
    assert split_layers(7, 2, [3, 4]) == (range(3), range(3, 7))


def test_embedding_and_output_layer_count_as_layers_where_a_split_is_uneven():
    assert [len(part) for part in split_layers(30, 8)] == [3, 4, 4, 4, 4, 4, 4, 3]
    assert [len(part) for part in split_layers(5, 4)] == [1, 2, 1, 1]


SPLITS = [(layers, stages) for layers in (1, 2, 3, 7, 13, 32, 61) for stages in (1, 2, 3, 5, 7) if stages <= layers]


@pytest.mark.parametrize(("layers", "stages"), SPLITS)
def test_every_layer_is_in_one_stage_and_the_load_differs_by_a_layer_at_most(layers, stages):
    parts = split_layers(layers, stages)
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert min(len(part) for part in parts) >= 1
    if layers % stages == 0:
        assert {len(part) for part in parts} == {layers // stages}
        return
    load = [len(part) + (i == 0) + (i == stages - 1) for i, part in enumerate(parts)]
    # A stage of one layer cannot give any away.
    assert max(load) - min(load) <= 1 or all(len(parts[i]) == 1 for i in range(stages) if load[i] == max(load))

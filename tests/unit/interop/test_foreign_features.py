"""Weights of models that compute something else are refused by name, in every format, before anything is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moepp.errors import CheckpointError
from moepp.interop import hf, official, upcycle
from moepp.interop.weights import TensorFolder
from tests.official_cases import GOLDEN
from tests.unit.interop.test_upcycle import CFG, dense_tensors, write_dense

LONG_ROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0], "long_factor": [2.0]}
FOREIGN: list[dict[str, Any]] = [
    {"sliding_window": 31},
    {"model_type": "mistral", "sliding_window": 4},
    {"model_type": "mistral", "sliding_window": 4, "use_sliding_window": False},
    {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"hidden_act": "gelu"},
    {"use_qk_norm": True},
    {"attn_logit_softcapping": 50.0},
    {"final_logit_softcapping": 30.0},
    {"embedding_multiplier": 12.0},
    {"residual_multiplier": 0.22},
    {"scale_depth": 1.4},
    {"logits_scaling": 8.0},
    {"attention_multiplier": 0.25},
    {"use_parallel_residual": True},
    {"partial_rotary_factor": 0.5},
    {"head_dim": 8},
    {"quantization_config": {"quant_method": "gptq"}},
    {"num_local_experts": 8},
    {"pretraining_tp": 2},
    {"sandwich_norm": True},
    {"never_heard_of": 1},
    {"auto_map": {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}},
    {"architectures": ["OtherForCausalLM"]},
    {"tie_word_embeddings": True},
    {"rope_scaling": {"type": "ntk", "factor": 2.0}},
    {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    {"rope_scaling": LONG_ROPE},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0}}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},  # rope_theta is 500 beside it
    {"rope_scaling": {"type": "linear"}},
    {"num_attention_heads": 0},
    *({"model_type": kind} for kind in ("mixtral", "qwen2", "gemma2", "granite", "minicpm", "phi3", None)),
]


@pytest.mark.parametrize("changes", FOREIGN, ids=str)
def test_dense_models_with_foreign_features_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_dense(tmp_path / "dense", dense_tensors(), **changes)
    with pytest.raises(CheckpointError) as caught:
        upcycle.check_folder(folder, CFG)
    message, key = str(caught.value), list(changes)[-1]
    assert "\n" not in message
    named = {
        "head_dim": "head size",
        "model_type": "describes a model of type",
        "tie_word_embeddings": "tie_embeddings",
    }
    assert named.get(key, key) in message or "sliding_window" in message or "rotary" in message, message


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral"},  # its window of 4,096 is longer than any sequence
        {"model_type": "mistral", "sliding_window": None},
        {"sliding_window": 32, "layer_types": ["sliding_attention"] * 3},
        {"hidden_act": "swish", "pretraining_tp": 1, "partial_rotary_factor": 1.0, "attention_bias": False},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 1.0}},
        {"torch_dtype": "bfloat16", "transformers_version": "4.46", "never_heard_of": None, "architectures": None},
    ],
    ids=str,
)
def test_features_that_change_nothing_are_accepted(tmp_path: Path, changes: dict[str, Any]) -> None:
    upcycle.check_folder(write_dense(tmp_path / "dense", dense_tensors(), **changes), CFG)


ODD: list[Any] = [
    True,
    -1,
    10**30,
    1e300,
    "",
    "x\x1b[2J",
    [],
    [None],
    [[]],
    [{}],
    [1, "a"],
    {},
    {"a": []},
    {"rope_type": []},
]


def test_values_of_every_json_type_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "dense", dense_tensors())
    whole = json.loads((folder / "config.json").read_text())
    keys = whole.keys() | set(upcycle._KEYS) | {"architectures", "torch_dtype", "num_experts", "quantization_config"}
    refused = dict.fromkeys(keys, 0)
    for key in keys:
        for value in ODD:
            (folder / "config.json").write_text(json.dumps(whole | {key: value}))
            try:
                upcycle.check_folder(folder, CFG)
            except CheckpointError as error:
                refused[key] += 1
                assert str(error).isprintable() and len(str(error)) < 1000, (key, value)
    assert refused["layer_types"] >= 9 and refused["architectures"] >= 9 and refused["hidden_size"] == len(ODD)


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    folder = write_dense(tmp_path / "dense", dense_tensors(), tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        upcycle.check_folder(folder, replace(CFG, tie_embeddings=True))


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"attention_bias": True}, {"moe_new": 1}], ids=str)
@pytest.mark.parametrize("form", ["official", "moepp"])
def test_moe_folders_with_foreign_features_are_refused(tmp_path: Path, form: str, changes: dict[str, Any]) -> None:
    folder, source = tmp_path / "weights", GOLDEN / "default"
    if form == "official":
        shutil.copytree(source, folder)
    else:
        model = official.load_pretrained(source)
        hf.save_pretrained(model.transformer, folder, model.token_ids)
    read = official.read_config if form == "official" else hf.read_config
    read(folder)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | changes))
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        read(folder)


def sharded(folder: Path) -> tuple[Path, dict[str, str]]:
    """The golden tensors in two shards, and their index."""
    folder.mkdir()
    tensors = load_file(GOLDEN / "default" / "model.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    write_index(folder, weight_map)
    return folder, weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read_as_their_index_says(tmp_path: Path) -> None:
    folder, weight_map = sharded(tmp_path / "shards")
    save_file({"extra": torch.ones(2)}, folder / "model-00003-of-00003.safetensors")  # not in the index
    assert set(TensorFolder(folder).shapes) == set(weight_map)
    first, last = sorted(set(weight_map.values()))
    key = next(key for key, name in weight_map.items() if name == first)

    write_index(folder, weight_map | {key: last})
    with pytest.raises(CheckpointError, match=f"{first} holds 1 tensors that the index places elsewhere"):
        TensorFolder(folder)
    write_index(folder, {other: name for other, name in weight_map.items() if other != key})
    with pytest.raises(CheckpointError, match="does not name"):
        TensorFolder(folder)
    write_index(folder, weight_map)
    (folder / last).rename(folder / "away")
    with pytest.raises(CheckpointError, match=f"lacks 1 of the 2 files of its index .{last}"):
        TensorFolder(folder)
    (folder / "away").rename(folder / "model.safetensors")
    shutil.copy(folder / "model.safetensors", folder / last)
    with pytest.raises(CheckpointError, match="and an index of other files"):
        TensorFolder(folder)


def test_configurations_that_transformers_saved_are_read(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from moepp.interop.hf.code.configuration_moepp import MoeppConfig

    MoeppConfig(hidden_size=96, architectures=["MoeppForCausalLM"]).save_pretrained(tmp_path)
    assert hf.read_config(tmp_path).hidden_size == 96

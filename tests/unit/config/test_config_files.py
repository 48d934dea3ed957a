"""Every shipped configuration composes, passes all checks on a fitting number of processes, and builds its model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from moepp.config import Config, from_dict, from_hydra, known_keys, register_defaults, to_dict, validate
from moepp.config.defaults import default_tree
from moepp.model import Transformer

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*/**/*.yaml"))


@pytest.fixture(autouse=True, scope="module")
def hydra() -> Iterator[None]:
    register_defaults()
    with initialize_config_dir(config_dir=str(CONFIGS), version_base=None):
        yield


def load(*overrides: str) -> Config:
    return from_hydra(compose("config", list(overrides)))


def build_on_meta(cfg: Config) -> Transformer:
    with torch.device("meta"):
        return Transformer(cfg.model)


@pytest.mark.parametrize("file", FILES)
def test_shipped_configuration_builds(file):
    group, _, name = file.rpartition("/")
    more = ["train.samples=0"] if file == "engine/fsdp" else []  # its layers cannot be asked for samples
    cfg = load(f"{group}={name}" if (CONFIGS / group).is_dir() else name, *more)
    validate(cfg, 1)
    validate(cfg, 2)
    model = build_on_meta(cfg)
    assert len(model.layers) == cfg.model.num_layers


def test_every_group_of_the_defaults_is_looked_at():
    groups = {file.split("/")[0] for file in FILES}
    assert {"model", "data", "optim", "parallel", "engine", "logging", "experiment", "sweep"} <= groups


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("experiment/moe")])
def test_experiment_fits_expert_parallel_clusters(file):
    overrides = [f"experiment={file.removeprefix('experiment/')}"]
    cfg = load(*overrides)
    assert cfg.run.name == file.removeprefix("experiment/")
    assert cfg.model.vocab_size == 65536 and cfg.data.seq_len == 2048
    assert cfg.train.global_batch_size * cfg.data.seq_len == 4 * 2**20, "the paper's 4M tokens per step"
    assert (cfg.optim.lr, cfg.optim.min_lr, cfg.optim.warmup_steps) == (5e-4, 5e-5, 2000)
    validate(load(*overrides, "parallel.expert=8"), 32)


def test_every_key_can_be_overridden_without_a_plus():
    """``train.py section.key=value`` must work for each key, so each stands in the composed configuration."""
    tree = OmegaConf.to_container(compose("config"), resolve=True)

    def present(key: str) -> bool:
        node: Any = tree
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return node is None  # a section that is null as a whole is given as a mapping
            node = node[part]
        return True

    assert [key for key in known_keys() if not present(key)] == []


@pytest.mark.parametrize("file", FILES)
def test_every_key_can_be_overridden_whatever_a_file_leaves_out(file):
    group, _, name = file.rpartition("/")
    tree = compose("config", [f"{group}={name}"])
    nothing = object()
    assert [key for key in known_keys() if OmegaConf.select(tree, key, default=nothing) is nothing] == []


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("model/")])
def test_model_file_says_only_what_differs_from_the_defaults(file):
    def repeated(tree: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
        inner = [name for key in tree if isinstance(tree[key], dict) for name in repeated(tree[key], defaults[key])]
        return inner + [key for key in tree if tree[key] == defaults[key]]

    assert repeated(yaml.safe_load((CONFIGS / f"{file}.yaml").read_text()), default_tree()["model"]) == []


def test_defaults_are_those_of_the_typed_configuration():
    tree = default_tree()
    assert [key for key in ("model", "data", "train") if "???" in str(tree[key])] == ["model", "data", "train"]
    set_keys = OmegaConf.to_container(compose("config"), resolve=True)
    assert isinstance(set_keys, dict)
    for section in ("guard", "checkpoint", "eval", "init", "runtime", "parallel"):  # nothing sets them
        assert set_keys[section] == tree[section]
        assert to_dict(from_dict(set_keys | {section: {}}))[section] == tree[section]


@pytest.mark.parametrize("pair", [("moepp_0.6b", "moe_0.6b"), ("tiny", "tiny_vanilla")])
def test_vanilla_twin_differs_in_the_experts_alone(pair):
    plus, vanilla = (load(f"model={name}").model for name in pair)
    assert vanilla.moe.num_zero_computation_experts == 0 and not vanilla.moe.gating_residual
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "max_seq_len"):
        assert getattr(plus, name) == getattr(vanilla, name)
    for name in ("num_ffn_experts", "ffn_hidden_size", "top_k"):
        assert getattr(plus.moe, name) == getattr(vanilla.moe, name)


def test_demo_numbers_do_not_depend_on_the_layout():
    moe = load().model.moe
    assert moe.capacity_factor is None and moe.balance_loss_scope == "global_batch"

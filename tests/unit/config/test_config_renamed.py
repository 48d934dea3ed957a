"""Keys of earlier versions: typed, they are errors that name today's key; in stored runs they still mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from moepp.config import composition_error, configs_folder, from_dict, from_stored, known_keys, register_defaults
from moepp.config.suggest import RENAMED
from moepp.errors import ConfigError

# Keys that a version of the package has had: one a line. A key that goes stays here.
EVER = (Path(__file__).resolve().parents[2] / "golden/config_keys.txt").read_text().split()
# A value of an old key, and what it makes of the configuration: (old key, old value, today's key, today's value).
STORED = [
    ("parallel.exchange_parts", 3, "parallel.exchange_chunks", 3),
    ("model.moe.triton_kernels", True, "runtime.kernels", "triton"),
    ("model.moe.triton_kernels", False, "runtime.kernels", "auto"),
]


def test_every_key_of_an_earlier_version_is_known_or_renamed():
    assert [key for key in EVER if key not in known_keys() and key not in RENAMED] == []
    assert not set(RENAMED) & set(known_keys())


@pytest.mark.parametrize("old", RENAMED)
def test_renamed_key_is_an_error_that_names_todays(old):
    new = RENAMED[old].split()[0]
    assert new in known_keys()
    expected = f"configuration key {old} is now {RENAMED[old]}; write that instead"
    register_defaults()
    with initialize_config_dir(config_dir=str(configs_folder()), version_base=None):
        with pytest.raises(HydraException) as refused:
            compose("config", [f"{old}=1"])
        assert str(composition_error(refused.value)) == expected
    with pytest.raises(ConfigError) as caught:  # in a file of --config-dir, or with ++
        from_dict(_stored(old, 1))
    assert str(caught.value) == expected


def test_every_renamed_key_of_a_stored_configuration_is_tried():
    assert {old for old, *_ in STORED} == set(RENAMED)


@pytest.mark.parametrize(("old", "old_value", "new", "value"), STORED)
def test_renamed_key_of_a_stored_configuration_means_the_same(old, old_value, new, value):
    node: Any = from_stored(_stored(old, old_value))
    for part in new.split("."):
        node = getattr(node, part)
    assert node == value


def _stored(key: str, value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {section: {} for section in ("run", "optim", "parallel", "engine", "guard", "checkpoint")}
    tree |= {
        "logging": {},
        "model": {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
        | {"max_seq_len": 32, "moe": {"num_ffn_experts": 4, "ffn_hidden_size": 8}},
        "data": {"paths": ["a"], "seq_len": 16},
        "train": {"steps": 3, "global_batch_size": 8},
    }
    node = tree
    *sections, last = key.split(".")
    for section in sections:
        node = node[section]
    node[last] = value
    return tree

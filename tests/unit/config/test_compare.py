"""What a run may change when it continues, and keys that are newer than it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from moepp.config.compare import breaking_differences, flatten
from moepp.config.defaults import MISSING, default_tree


def whole_config() -> dict[str, Any]:
    tree = copy.deepcopy(default_tree())
    tree["model"] |= dict.fromkeys(("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads"), 64)
    return tree


def without(tree: dict[str, Any], key: str) -> Any:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree[section]
    return tree.pop(last)


NEWER = [
    key for key, value in flatten(default_tree()).items() if key.startswith(("model.", "data.")) and value != MISSING
]


@pytest.mark.parametrize("key", NEWER)
def test_a_run_that_is_older_than_a_key_is_taken_to_have_its_default(key):
    old, new = whole_config(), whole_config()
    without(old, key)
    assert breaking_differences(old, new) == []
    *sections, last = key.split(".")
    inner = new
    for section in sections:
        inner = inner[section]
    inner[last] = "something else"
    found = breaking_differences(old, new)
    assert found == ([] if key == "data.cache_dir" else [f"{key}: {flatten(whole_config())[key]} -> something else"])


def test_a_required_key_that_is_absent_is_said():
    old, new = whole_config(), whole_config()
    without(old, "model.num_heads")
    assert breaking_differences(old, new) == ["model.num_heads: absent -> 64"]

"""What a run may change when it continues, and keys that are newer than it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from moepp.config.compare import TRAINING_ONLY, breaking_differences, flatten, other_differences
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


@pytest.mark.parametrize("key", sorted(TRAINING_ONLY))
def test_what_weights_do_not_depend_on_may_change_before_the_first_step_alone(key):
    old, new = whole_config(), whole_config()
    *sections, last = key.split(".")
    inner = new
    for section in sections:
        inner = inner[section]
    inner[last] = "another"
    for untrained, refused, told in ((False, 1, 0), (True, 0, 1)):
        assert len(breaking_differences(old, new, untrained=untrained)) == refused
        assert len(other_differences(old, new, untrained=untrained)) == told


def test_the_page_lists_those_keys_for_imported_weights_and_for_no_other_run():
    page = (Path(__file__).resolve().parents[3] / "docs/configuration.md").read_text()
    _, _, section = page.partition("## What may change when a run continues\n\n")
    continued, imported, *_ = section.split("\n\n")
    names = {key.rpartition(".")[2] for key in TRAINING_ONLY}
    listed = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", imported)} - {"path", "moe"}
    assert listed == names
    assert not names & {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", continued)}

"""What may change between a checkpoint and the run that continues it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moepp.config.defaults import MISSING, default_tree
from moepp.config.load import upgrade
from moepp.io.untrusted import printable

_ABSENT = "absent"
# Keys of the model that change neither its shapes nor the function that its weights compute.
TRAINING_ONLY = {"model.init_std", "model.constant_init_std", "model.max_seq_len"} | {
    f"model.moe.{key}"
    for key in (
        *("tau", "capacity_factor", "drop_policy", "expert_chunk_rows", "balance_loss_weight"),
        *("balance_rule", "balance_loss_scope", "balance_loss_switch_scale", "z_loss_weight"),
    )
}


# Where data and tokenizer lie. The same content may lie elsewhere; who has compared it says so with ``same_data``.
PLACES_OF_DATA = ("data.paths", "data.tokenizer")


def breaking_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, untrained: bool = False, same_data: bool = False
) -> list[str]:
    """Return "key: old -> new" for every key that must stay the same over the life of a run.

    Args:
        untrained: no step was taken yet (imported weights): only what the weights were made for must stay.
        same_data: the content of datasets and tokenizer was compared, so that their paths may differ.
    """
    old, new = _whole(old), _whole(new)
    fixed = {key for key in _keys(old, new) if _must_agree(key, untrained, same_data)}
    return _differences(old, new, fixed)


def other_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, untrained: bool = False, same_data: bool = False
) -> list[str]:
    """Return "key: old -> new" for every other key that changed; arguments as for :func:`breaking_differences`."""
    old, new = _whole(old), _whole(new)
    free = {key for key in _keys(old, new) if not _must_agree(key, untrained, same_data)}
    return _differences(old, new, free)


def _whole(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored configuration, flat, with the defaults of keys that are newer than it."""
    found = flatten(upgrade(tree))
    for key, value in flatten(default_tree()).items():
        has_parts = any(other.startswith(f"{key}.") for other in found)
        if value != MISSING and key not in found and not has_parts:
            found[key] = value
    return found


def differing_keys(trees: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return dotted keys that do not have the same value in all configurations."""
    flat = [flatten(tree) for tree in trees]
    keys = {key for tree in flat for key in tree}
    return {key for key in keys if any(tree.get(key, _ABSENT) != flat[0].get(key, _ABSENT) for tree in flat)}


def changed_values(old: Mapping[str, Any], new: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Return "key: old -> new" for every one of ``keys`` that both have, or a part of that name, with another value."""
    flat_old, flat_new = flatten(old), flatten(new)
    prefixes = tuple(f"{key}." for key in keys)
    return [
        f"{key}: {flat_old[key]} -> {flat_new[key]}"
        for key in flat_new
        if f"{key}.".startswith(prefixes) and key in flat_old and flat_old[key] != flat_new[key]
    ]


def _keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*flatten(new), *flatten(old)]))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], wanted: set[str]) -> list[str]:
    flat_old, flat_new = flatten(old), flatten(new)
    keys = [key for key in _keys(old, new) if key in wanted]
    return [
        f"{printable(key)}: {printable(flat_old.get(key, _ABSENT))} -> {printable(flat_new.get(key, _ABSENT))}"
        for key in keys
        if flat_old.get(key, _ABSENT) != flat_new.get(key, _ABSENT)
    ]


def _must_agree(key: str, untrained: bool, same_data: bool) -> bool:
    """Model, data, seed and batch decide what the run computes; the data cache and what is evaluated do not."""
    if untrained:
        return key.startswith("model.") and key not in TRAINING_ONLY
    if key == "data.cache_dir" or key.startswith("data.validation.") or (same_data and key in PLACES_OF_DATA):
        return False
    return key.startswith(("model.", "data.")) or key in ("run.seed", "optim.name", "train.global_batch_size")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

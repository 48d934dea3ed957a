"""What may change between a checkpoint and the run that continues it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ABSENT = "absent"


def breaking_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """ "key: old -> new" for every key that must stay the same over the life of a run."""
    return _differences(old, new, must_agree=True)


def other_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """ "key: old -> new" for every other key that changed."""
    return _differences(old, new, must_agree=False)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], must_agree: bool) -> list[str]:
    flat_old, flat_new = _flatten(old), _flatten(new)
    keys = [key for key in dict.fromkeys([*flat_new, *flat_old]) if _must_agree(key) == must_agree]
    return [
        f"{key}: {flat_old.get(key, _ABSENT)} -> {flat_new.get(key, _ABSENT)}"
        for key in keys
        if flat_old.get(key, _ABSENT) != flat_new.get(key, _ABSENT)
    ]


def _must_agree(key: str) -> bool:
    """Model, data, seed and batch decide what the run computes; a place such as the data cache does not."""
    if key == "data.cache_dir":
        return False
    return key.startswith(("model.", "data.")) or key in ("run.seed", "optim.name", "train.global_batch_size")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

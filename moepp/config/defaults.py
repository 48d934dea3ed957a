"""The defaults of the typed configuration as the Hydra configuration ``base``: ``configs/config.yaml`` starts from it.

So every key exists, and can be overridden, whatever the files of a group leave out; what a key means and its default
are written once, in the dataclasses. The node is a plain one: types are checked by :func:`moepp.config.from_hydra`,
whose messages name the rule and the remedy.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from moepp.config.schema import Config

BASE = "base"
MISSING = "???"  # Hydra's mark of a key that has to be set


def register_defaults() -> None:
    """Make ``base`` known to Hydra; call it before anything is composed."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=BASE, node=default_tree())


def default_tree(cls: type = Config) -> dict[str, Any]:
    """Return every key with its default, ``???`` where there is none."""
    tree: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for entry in dataclasses.fields(cls):
        key, hint = entry.metadata.get("key", entry.name), hints[entry.name]
        if dataclasses.is_dataclass(hint):
            tree[key] = default_tree(typing.cast(type, hint))
        elif entry.default is not dataclasses.MISSING:
            tree[key] = list(entry.default) if isinstance(entry.default, tuple) else entry.default
        elif entry.default_factory is not dataclasses.MISSING:
            value = entry.default_factory()
            tree[key] = list(value) if isinstance(value, tuple | list) else dict(value)
        else:
            tree[key] = MISSING
    return tree

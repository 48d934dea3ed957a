"""Megatron-core without what its package imports at once: layers and fused kernels, and with them torch's compiler.

Its datasets need none of that, and it takes each process of a run seconds, and a cluster's file system thousands of
reads.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

NAME = "megatron.core"


class _Package(ModuleType):
    """The package; its own code runs when something is asked for that is no module of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if importlib.util.find_spec(f"{NAME}.{name}") is not None:
            return importlib.import_module(f"{NAME}.{name}")
        self.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]  # a plain module from here on
        spec = self.__spec__
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(self)
        return getattr(self, name)


def import_lazily() -> None:
    """Let ``import megatron.core.X`` run the code of X alone from now on; without effect if the package is there."""
    spec = importlib.util.find_spec(NAME) if NAME not in sys.modules else None
    if spec is None:
        return
    package = _Package(NAME)
    package.__spec__, package.__loader__, package.__file__ = spec, spec.loader, spec.origin
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[NAME] = package
    parent, _, child = NAME.rpartition(".")
    setattr(sys.modules[parent], child, package)
    importlib.import_module(f"{NAME}.parallel_state")  # first: it and utils import each other

"""Named parts that can be added from outside the package: expert kinds, routers, gate normalisations, balance rules.

Registering one is enough to train with it, log it, checkpoint it and resume it; see docs/extending.md. The module that
registers it is named in ``runtime.plugins``, or imported before the configuration is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from moepp.errors import ConfigError

T = TypeVar("T")


class Registry:
    """What one configuration key can name.

    Args:
        what: for messages, singular.
        key: of the configuration.
        builtin: module that registers the package's own entries; imported when it is first needed.
        reserved: names that cannot be registered.
    """

    def __init__(self, what: str, key: str, builtin: str, reserved: tuple[str, ...] = ()) -> None:
        self.what, self.key, self._builtin, self._reserved = what, key, builtin, reserved
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: enter a class or function under ``name``.

        Raises:
            ConfigError: the name is taken by another one, or is no plain word.
        """
        if not name.isidentifier() or name in self._reserved:
            raise ConfigError(
                f"{self.what} {name!r}: a name is letters, digits and underscores and none of "
                f"{', '.join(self._reserved) or 'the registered ones'}; choose another one"
            )

        def enter(entry: T) -> T:
            known = self._entries.setdefault(name, entry)
            # A module that is imported twice (as a script and by name) may register the same thing again.
            if known is not entry and getattr(known, "__qualname__", 0) != getattr(entry, "__qualname__", 1):
                raise ConfigError(f"{self.what} {name!r} is registered already ({known!r}); choose another name")
            return entry

        return enter

    def names(self) -> tuple[str, ...]:
        """All registered names, the package's own first."""
        importlib.import_module(self._builtin)
        return tuple(self._entries)

    def get(self, name: str) -> Any:
        """The entry of that name.

        Raises:
            ConfigError: there is none.
        """
        self.require(name)
        return self._entries[name]

    def require(self, name: str, key: str | None = None) -> None:
        """Raise :class:`ConfigError` unless ``name`` is registered."""
        if name not in self.names():
            raise ConfigError(
                f"{key or self.key}={name!r} is not one of {', '.join(self.names())}; choose one of them, or name the "
                "module that registers it in runtime.plugins"
            )


EXPERT_KINDS = Registry(
    "expert kind",
    "model.moe.extra_experts",
    "moepp.moe.experts.zero_computation",
    reserved=("ffn", "constant", "copy", "zero", "alpha_proj", "value"),
)
ROUTERS = Registry("router", "model.moe.router", "moepp.moe.router")
GATE_NORMALIZATIONS = Registry("gate normalisation", "model.moe.gate_normalization", "moepp.moe.gates")
BALANCE_RULES = Registry("balance rule", "model.moe.balance_rule", "moepp.moe.losses")

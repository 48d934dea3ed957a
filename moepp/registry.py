"""Named parts that can be added from outside the package: expert kinds, routers, gate normalisations, balance rules.

Registering one is enough to train with it, log it, checkpoint it and resume it; see docs/extending.md. The module that
registers it is named in ``runtime.plugins``, or imported before the configuration is made.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from moepp.errors import ConfigError, UnknownPartError
from moepp.io.untrusted import show

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
        self.what, self.key, self._builtin = what, key, builtin
        self._reserved = set(reserved)
        self._entries: dict[str, Any] = {}

    def reserve(self, names: Iterable[str]) -> None:
        """Further names that cannot be registered."""
        self._reserved.update(names)

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters a class or function under ``name``.

        Raises:
            ConfigError: the name is taken by another one, is reserved, or is no plain word.
        """
        importlib.import_module(self._builtin)  # the package's own entries first: nothing can take their names
        if not name.isidentifier() or not name.isascii():  # it becomes part of keys in checkpoints and metrics
            raise ConfigError(
                f"{self.what} {name!r}: a name is made of ASCII letters, digits and underscores and starts with no "
                "digit; choose another one"
            )
        if name in self._reserved:
            raise ConfigError(f"{self.what} {name!r}: the name has a meaning of its own already; choose another one")

        def enter(entry: T) -> T:
            known = self._entries.get(name, entry)
            # A module that is imported twice (as a script and by name) may register the same thing again.
            if known is not entry and _origin(known) != _origin(entry):
                raise ConfigError(f"{self.what} {name!r} is registered already ({known!r}); choose another name")
            self._entries[name] = entry
            return entry

        return enter

    def names(self) -> tuple[str, ...]:
        """Return all registered names, the package's own first."""
        importlib.import_module(self._builtin)
        return tuple(self._entries)

    def get(self, name: str) -> Any:
        """Return the entry of that name.

        Raises:
            ConfigError: there is none.
        """
        self.require(name)
        return self._entries[name]

    def require(self, name: str, key: str | None = None) -> None:
        """Raise :class:`ConfigError` unless ``name`` is registered."""
        if name not in self.names():
            raise UnknownPartError(
                f"{key or self.key}={show(name)} is not one of {', '.join(self.names()) or 'those registered (none)'}; "
                "choose one of them, or name the module that registers it in runtime.plugins"
            )


def _origin(entry: Any) -> tuple[Any, Any]:
    """Return the name and file that identify a class or function."""
    module = sys.modules.get(getattr(entry, "__module__", ""))
    return getattr(entry, "__qualname__", id(entry)), getattr(module, "__file__", None)


EXPERT_KINDS = Registry(
    "expert kind",
    "model.moe.extra_experts",
    "moepp.moe.experts.zero_computation",
    reserved=("ffn", "constant", "copy", "zero", "alpha_proj", "value"),
)
ROUTERS = Registry("router", "model.moe.router", "moepp.moe.router")
GATE_NORMALIZATIONS = Registry("gate normalisation", "model.moe.gate_normalization", "moepp.moe.gates")
BALANCE_RULES = Registry("balance rule", "model.moe.balance_rule", "moepp.moe.losses")

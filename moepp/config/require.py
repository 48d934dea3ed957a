"""Checks of single values that raise :class:`ConfigError`."""

from __future__ import annotations

from moepp.errors import ConfigError
from moepp.io.untrusted import show

LARGEST = 10**12  # of settings without a bound of their own: what is computed from them stays within 64 bits


def require(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def require_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``choices``."""
    require(value in choices, f"{key}={show(value)} is not one of {', '.join(choices)}; choose one of them")


def require_at_least(key: str, value: float, minimum: float, maximum: float = LARGEST) -> None:
    """Raise :class:`ConfigError` unless ``minimum <= value <= maximum`` (NaN is refused too)."""
    require(value >= minimum, f"{key}={value} is below its minimum {minimum}; raise it")
    _require_at_most(key, value, maximum)


def require_above(key: str, value: float, bound: float, maximum: float = LARGEST) -> None:
    """Raise :class:`ConfigError` unless ``bound < value <= maximum`` (NaN is refused too)."""
    require(value > bound, f"{key}={value} must be greater than {bound}; raise it")
    _require_at_most(key, value, maximum)


def _require_at_most(key: str, value: float, maximum: float) -> None:
    require(value <= maximum, f"{key}={value} is above its maximum {maximum:,}; lower it")

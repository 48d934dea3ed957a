"""Checks of single values that raise :class:`ConfigError`."""

from __future__ import annotations

from moepp.errors import ConfigError
from moepp.io.untrusted import show


def require(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def require_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``choices``."""
    require(value in choices, f"{key}={show(value)} is not one of {', '.join(choices)}; choose one of them")


def require_at_least(key: str, value: float, minimum: float) -> None:
    """Raise :class:`ConfigError` unless ``value >= minimum`` (NaN is refused too)."""
    require(value >= minimum, f"{key}={value} is below its minimum {minimum}; raise it")


def require_above(key: str, value: float, bound: float) -> None:
    """Raise :class:`ConfigError` unless ``value > bound`` (NaN is refused too)."""
    require(value > bound, f"{key}={value} must be greater than {bound}; raise it")

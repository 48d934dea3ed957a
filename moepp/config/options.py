"""Options of registered parts: each takes the type of its default."""

from __future__ import annotations

import math
from collections.abc import Mapping

from moepp.config.require import require
from moepp.errors import ConfigError
from moepp.io.untrusted import show

Option = bool | int | float | str

_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_LARGEST = 2**53  # up to there numbers of floating point tell whole numbers apart


def convert_options(
    given: Mapping[str, Option], defaults: Mapping[str, Option], key: str, owner: str
) -> dict[str, Option]:
    """Return the options that are given, by name, each in the type of its default.

    A whole number is an integer however it is written, and a number is a text where one is wanted.

    Args:
        given: from the configuration.
        defaults: every option that there is.
        key: of the configuration, for messages.
        owner: the part, for messages.

    Raises:
        ConfigError: an option that there is not, or a value that is not of its default's type.
    """
    converted = {}
    for name, value in sorted(given.items()):
        where = f"{key}.{show(name)[1:-1]}"
        require(
            name in defaults,
            f"{where} is not an option of {owner} (it has {', '.join(defaults) or 'none'}); remove it",
        )
        kind = type(defaults[name])
        require(
            kind in _WANTED,
            f"{owner} declares {where} with the default {show(defaults[name])}; give it true, false, a number "
            "or a text",
        )
        value_of_kind = _convert(value, kind)
        if value_of_kind is None:
            raise ConfigError(
                f"{where}={show(value)} is not {_WANTED[kind]}, as its default {show(defaults[name])} is; give one"
            )
        converted[name] = value_of_kind
    return converted


def _convert(value: Option, kind: type) -> Option | None:
    """Return the value in this type; None: it has none."""
    if type(value) is kind:
        return value if not isinstance(value, float) or math.isfinite(value) else None
    if isinstance(value, bool | str) or kind is bool:
        return None
    if kind is str:
        return str(value)
    if kind is float:
        return float(value)
    return int(value) if abs(value) <= _LARGEST and value == int(value) else None  # NaN fails the first comparison

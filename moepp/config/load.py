"""From a Hydra configuration (or a plain dictionary) to the typed one, and back."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from moepp.config.schema import Config
from moepp.errors import ConfigError

_LISTED_KEYS = 30  # an error names all known keys up to so many
_QUOTING = "quote a text with commas or brackets, as 'key=\"a,b\"'"
# Of Hydra 1.3, short and long.
_HYDRA_OPTIONS = {
    *("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "--resolve", "-p", "--package", "-r", "--run"),
    *("-m", "--multirun", "-sc", "--shell-completion", "-cp", "--config-path", "-cn", "--config-name", "-cd"),
    *("--config-dir", "--experimental-rerun", "-i", "--info"),
}


def from_hydra(cfg: Any) -> Config:
    """Turn Hydra's DictConfig into a :class:`Config`.

    Raises:
        ConfigError: an unknown, missing or wrongly typed key, or a value out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}=??? has no value; set it") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key} does not resolve: {reason}; correct the reference") from error
    return from_dict(tree)


def from_dict(tree: Any) -> Config:
    """Turn nested dictionaries into a :class:`Config`; errors as in :func:`from_hydra`."""
    return build(Config, tree, "")


def build(cls: type, tree: Any, path: str) -> Any:
    """Build dataclass ``cls`` from mapping ``tree``; ``path`` is the key's prefix in messages."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path or 'configuration'}={tree!r} must be a mapping of keys; see configs/")
    fields = {f.metadata.get("key", f.name): f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in fields:
            raise ConfigError(unknown_key_message(_join(path, str(key)), _join_all(path, fields)))
    values = {}
    for key, f in fields.items():
        if key in tree:
            values[f.name] = _convert(tree[key], hints[f.name], _join(path, key))
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(path, key)} is missing and has no default; set it")
    return cls(**values)


def unknown_key_message(key: str, known: list[str]) -> str:
    """One line for a mistyped key, with the nearest known ones."""
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif len(known) <= _LISTED_KEYS:
        hint = f"known keys: {', '.join(sorted(known))}"
    else:
        hint = "configs/ lists the known ones"
    return f"unknown configuration key {key}; {hint}"


def known_keys(cls: type = Config, path: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys = []
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        key = _join(path, f.metadata.get("key", f.name))
        if dataclasses.is_dataclass(hints[f.name]):
            keys += known_keys(typing.cast(type, hints[f.name]), key)
        else:
            keys.append(key)
    return keys


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries (YAML and JSON friendly), the inverse of :func:`from_dict`."""
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = list(value)
        out[f.metadata.get("key", f.name)] = value
    return out


def _convert(value: Any, hint: Any, path: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
        raise ConfigError(f"{path}=null is not allowed; give {_describe(options)}")
    for option in options:
        if dataclasses.is_dataclass(option):
            return build(typing.cast(type, option), value, path)
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            item_hint = typing.get_args(option)[0]
            return tuple(_convert(item, item_hint, f"{path}[{i}]") for i, item in enumerate(value))
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ConfigError(f"{path}={value} is not a finite number; give one")
            return float(value)
        if option is str and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if isinstance(option, type) and type(value) is option:
            return value
    raise ConfigError(f"{path}={value!r} has the wrong type {type(value).__name__}; give {_describe(options)}")


def _describe(options: tuple[Any, ...]) -> str:
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return " or ".join(names.get(o, "a list" if typing.get_origin(o) is tuple else "a mapping") for o in options)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _join_all(path: str, keys: Any) -> list[str]:
    return [_join(path, key) for key in keys]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def explain_hydra_error(error: Exception) -> str:
    """One line for what Hydra or OmegaConf refused before the typed configuration was reached."""
    from hydra.errors import OverrideParseException

    text = _one_line(error)
    if isinstance(error, OverrideParseException):
        reason = " ".join(str(error).split("See https://")[0].split())
        return f"{error.override!r} cannot be read ({reason}); write key=value, a list as key=[a,b], and {_QUOTING}"
    if match := re.match(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]} gives several values; write a list as key=[a,b], {_QUOTING}, or add -m to sweep over them"
    if match := re.search(r"Could not find '([^']+)/([^']+)' Available options in '[^']+': (.*?) Config search", text):
        group, name, choices = match.groups()
        return f"{group}={name} does not exist in configs/{group}; choose one of {', '.join(choices.split())}"
    if (match := re.match(r"Could not override '([^']+)'", text)) and "To append to your config" in text:
        return unknown_key_message(match[1], known_keys())
    return text


def refuse_unknown_options(arguments: Sequence[str]) -> None:
    """Refuse options that Hydra does not have, such as a setting written with dashes, before it prints its usage.

    Raises:
        ConfigError: the first such option.
    """
    for argument in arguments:
        name = argument.partition("=")[0]
        if argument.startswith("-") and name not in _HYDRA_OPTIONS:
            raise ConfigError(
                f"{argument} is not an option; write settings as key=value without dashes, and see "
                "`train.py --help` for the options"
            )

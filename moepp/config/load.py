"""From a Hydra configuration (or a plain dictionary) to the typed one, and back."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import os
import types
import typing
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from moepp.config.schema import Config
from moepp.config.suggest import unknown_key_message
from moepp.errors import ConfigError, MoeppError, PluginError, UnknownPartError
from moepp.io.untrusted import printable, show

_MAX_INT, _MAX_TEXT = (1 << 64) - 1, 10_000


def from_hydra(cfg: Any) -> Config:
    """Turn Hydra's DictConfig into a :class:`Config`; modules named in ``runtime.plugins`` are imported first.

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
    import_plugins(tree)
    return from_dict(tree)


def from_dict(tree: Any) -> Config:
    """Turn nested dictionaries into a :class:`Config`; errors as in :func:`from_hydra`."""
    return _with_homes(build(Config, tree, ""))


def _with_homes(cfg: Config) -> Config:
    """Let ``~`` begin every path that is read: shells leave it as it is behind an equals sign."""

    def home(path: str | None) -> str | None:
        return None if path is None else os.path.expanduser(path)

    def homes(paths: Sequence[str]) -> tuple[str, ...]:
        return tuple(map(os.path.expanduser, paths))

    data = dataclasses.replace(
        cfg.data,
        paths=homes(cfg.data.paths),
        validation={name: homes(paths) for name, paths in cfg.data.validation.items()},
        tokenizer=home(cfg.data.tokenizer),
        cache_dir=home(cfg.data.cache_dir),
    )
    return dataclasses.replace(cfg, data=data, init=dataclasses.replace(cfg.init, path=home(cfg.init.path)))


def from_stored(tree: Any) -> Config:
    """As :func:`from_dict` for a configuration from a run or a checkpoint, of this or an earlier version.

    Its plugins are not imported: what a checkpoint names is not run.

    Raises:
        PluginError: it names a part that nothing has registered.
    """
    tree = upgrade(tree)
    try:
        return from_dict(tree)
    except UnknownPartError as error:
        names = [show(name)[1:-1] for name in _plugins(tree) if isinstance(name, str)]
        what = str(error).partition(" is not one of ")[0]
        remedy = "add --plugin MODULE with the module that registers it"
        if names:
            options = " ".join(f"--plugin {name}" for name in names)
            remedy = f"it was made with {options}: add that, if you trust the code, which is then run"
        raise PluginError(f"{what} is no part of this package; {remedy}") from error


def import_plugins(tree: Any) -> None:
    """Import the modules that register what the configuration names; errors as of :func:`import_plugin`."""
    for name in _plugins(tree):
        import_plugin(name, "runtime.plugins")


def import_plugin(name: Any, key: str) -> None:
    """Import one module that registers parts; ``key`` is where it is named.

    Raises:
        ConfigError: it cannot be imported.
    """
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(
            f"{key} names {show(name)}, which is no module; write it as in an import statement, such as my_parts or "
            "my_package.parts"
        )
    try:
        importlib.import_module(name)
    except MoeppError:
        raise  # a name that is taken, say
    except (Exception, SystemExit) as error:  # whatever its code does
        reason = printable(f"{type(error).__name__}: {error}")
        if name.endswith(".py"):
            raise ConfigError(
                f"{key} names the file {show(name)}; name the module, {name.removesuffix('.py').split('.')[-1]}"
            ) from error
        raise ConfigError(
            f"{key} names {show(name)}, which cannot be imported ({reason}); correct it, or put its folder on "
            "PYTHONPATH"
        ) from error


def _plugins(tree: Any) -> Sequence[Any]:
    """``runtime.plugins`` of a configuration that was not checked yet; what is no list is refused elsewhere."""
    runtime = tree.get("runtime") if isinstance(tree, Mapping) else None
    plugins = runtime.get("plugins") if isinstance(runtime, Mapping) else None
    return plugins if isinstance(plugins, list | tuple) else ()


def upgrade(tree: Any) -> Any:
    """Return a stored configuration with its renamed keys replaced by today's."""
    tree = copy.deepcopy(tree)
    try:
        if "split" in tree["data"]:  # a whole section
            tree["data"].setdefault("document_attention", False)
        if "init_std" in tree["model"]:  # a whole section
            tree["model"].setdefault("constant_init_std", 1.0)
        parallel, moe = tree["parallel"], tree["model"]["moe"]
        if "exchange_parts" in parallel:
            parallel["exchange_chunks"] = parallel.pop("exchange_parts")
        if "balance_loss_scope" in moe:  # a whole section
            moe.setdefault("balance_rule", "heterogeneous")
        if moe.pop("triton_kernels", False):
            tree.setdefault("runtime", {})["kernels"] = "triton"
    except (KeyError, TypeError, AttributeError):
        pass  # not of the right form: what reads it says so
    return tree


def build(cls: type, tree: Any, path: str) -> Any:
    """Build dataclass ``cls`` from mapping ``tree``; ``path`` is the key's prefix in messages."""
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"{path or 'configuration'}={show(tree)} must be a mapping of keys; `train.py --help` lists them"
        )
    fields = {f.metadata.get("key", f.name): f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in fields:
            raise ConfigError(unknown_key_message(printable(_join(path, printable(key, 100))), _join_all(path, fields)))
    values = {}
    for key, f in fields.items():
        if key in tree:
            values[f.name] = _convert(tree[key], hints[f.name], _join(path, key))
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(path, key)} is missing and has no default; set it")
    return cls(**values)


def known_keys(cls: type = Config, path: str = "") -> list[str]:
    """Return every dotted key of the configuration."""
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
    """Return nested plain dictionaries (YAML and JSON friendly), the inverse of :func:`from_dict`."""
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Mapping):
            value = {name: list(item) if isinstance(item, tuple) else item for name, item in value.items()}
        out[f.metadata.get("key", f.name)] = value
    return out


def _convert(value: Any, hint: Any, path: str) -> Any:
    _require_plain(value, path)
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
        if typing.get_origin(option) is Mapping and isinstance(value, Mapping):
            item_hint = typing.get_args(option)[1]
            return {str(key): _convert(item, item_hint, f"{path}.{key}") for key, item in value.items()}
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ConfigError(f"{path}={value} is not a finite number; give one")
            return float(value)
        if option is str and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if isinstance(option, type) and type(value) is option:
            return value
    raise ConfigError(
        f"{path}={show(value)} has the wrong type {type(value).__name__}; "
        f"give {_describe(options)}{_example(value, options, path)}"
    )


def _example(value: Any, options: tuple[Any, ...], path: str) -> str:
    """Return how a list, or a mapping of lists, is written instead of this value; "" for what needs no example."""
    if any(typing.get_origin(option) is Mapping and _is_list(typing.get_args(option)[1:]) for option in options):
        return f" of names and lists, for example {path}={{wiki: [data/wiki/text]}} or {path}.wiki=[data/wiki/text]"
    if not _is_list(options):
        return ""
    if isinstance(value, str):
        return f", for example {path}=[{printable(value, 60)}]"
    return f", for example {path}=[{show(value)}]" if isinstance(value, int | float) else ""


def _require_plain(value: Any, path: str) -> None:
    """Refuse what no setting needs, and what could harm a terminal or a reader of the value."""
    if isinstance(value, int) and abs(value) > _MAX_INT:
        raise ConfigError(f"{path} is an integer beyond 64 bits; give a smaller one")
    if isinstance(value, str):
        bad = next((c for c in value if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None)
        if bad is not None:
            raise ConfigError(f"{path}={show(value)} holds the control character {show(bad)}; remove it")
        if len(value) > _MAX_TEXT:
            raise ConfigError(f"{path}={show(value)} has {len(value):,} characters; give at most {_MAX_TEXT:,}")


def _is_list(options: tuple[Any, ...]) -> bool:
    return any(typing.get_origin(option) is tuple for option in options)


def _describe(options: tuple[Any, ...]) -> str:
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return " or ".join(names.get(o, "a list" if typing.get_origin(o) is tuple else "a mapping") for o in options)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _join_all(path: str, keys: Any) -> list[str]:
    return [_join(path, key) for key in keys]

"""Where configurations are read from, and what files of others may not say.

Hydra acts on its own part of a configuration before anything is checked: it makes folders (``hydra.run.dir``), opens
log files (``hydra.job_logging``), sets environment variables (``hydra.job.env_set``) and makes objects
(``hydra.callbacks``, launchers). ``runtime.plugins`` names code. Both are taken from the command line and from the
shipped folder of configurations alone; a file in another folder (--config-dir, --config-path, ``hydra.searchpath``)
that sets them is refused as soon as it is composed, before Hydra has acted.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal import hydra as hydra_app
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobRuntime, setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from moepp.config import configs_folder
from moepp.errors import ConfigError
from moepp.io.untrusted import printable, show

# What a file of others may set of Hydra's part (as it shows or finds files, or is checked on its own), and what Hydra
# itself fills in whatever a file says.
_HARMLESS = ("help", "searchpath", "sweeper.params")
_FILLED_IN = (
    *("overrides", "job.override_dirname", "job.config_name"),
    *(f"runtime.{name}" for name in ("version", "version_base", "cwd", "config_sources", "choices")),
)
_OF_HYDRA = re.compile(r"/?(_global_\.)?hydra\b")
_OF_PLUGINS = re.compile(r"/?(_global_\.)?runtime(\.plugins\b|$)")
_ABSENT = object()
_REMEDY = "remove it there, or give it on the command line if you trust it"


@dataclass(frozen=True)
class Sources:
    """Where configurations are read from: Hydra's options --config-path, --config-dir and --config-name."""

    config_path: str
    config_dir: str | None
    config_name: str

    def loader(self) -> CheckedLoader:
        """Hydra's loader over these folders."""
        version.setbase(None)  # pyright: ignore[reportArgumentType]  (None: of this release)
        setup_globals()
        JobRuntime.instance().set("name", "train")
        search_path = create_config_search_path(self.config_path)
        if self.config_dir is not None:
            folder = f"file://{os.path.abspath(self.config_dir)}"
            search_path.prepend("command-line", folder, SearchPathQuery(provider="schema"))
        return CheckedLoader(search_path)


@contextlib.contextmanager
def hydra_reads_checked() -> Iterator[None]:
    """Let Hydra's own application read configurations through :class:`CheckedLoader`."""
    name = ConfigLoaderImpl.__name__  # as its module calls it
    before = getattr(hydra_app, name)
    setattr(hydra_app, name, CheckedLoader)
    try:
        yield
    finally:
        setattr(hydra_app, name, before)


class CheckedLoader(ConfigLoaderImpl):
    """Hydra's loader; refuses what files outside the shipped folder may not say.

    What was composed is compared with what the shipped files give for the same words of the command line about Hydra
    and plugins, so it does not matter by which way a file has reached them (packages, defaults lists, references).
    """

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        cfg = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        parsed = OverridesParser.create().parse_overrides(overrides)
        if others := self._places_of_others(cfg, config_name, parsed):
            where = (
                f"a configuration file of {' or '.join(printable(place.removeprefix('file://')) for place in others)}"
            )
            _check(cfg, parsed, run_mode, where)
        return cfg

    def _process_config_searchpath(self, config_name: str | None, parsed_overrides: list[Override], repo: Any) -> None:
        """Refuse places other than folders, as Hydra imports the packages among them to find their files."""
        primary = None if config_name is None else repo.load_config(config_path=config_name)
        if primary is not None and not (_is_shipped(primary.path) and _is_inside(config_name)):
            places = OmegaConf.select(primary.config, "hydra.searchpath")
            for place in places if OmegaConf.is_list(places) else ():
                if "://" in str(place) and not str(place).startswith("file://"):
                    raise ConfigError(
                        f"hydra.searchpath of {printable(config_name)}.yaml names {show(place)}, whose code would be "
                        "imported; name folders, or give it on the command line if you trust it"
                    )
        super()._process_config_searchpath(config_name, parsed_overrides, repo)

    def _places_of_others(self, cfg: DictConfig, config_name: str | None, overrides: Sequence[Override]) -> list[str]:
        """Return the places besides the shipped folder and Hydra's own of which files may have been composed."""
        known = {
            (entry.provider, _with_scheme(entry.path)) for entry in _shipped_loader().config_search_path.get_path()
        }
        sources = [(source.provider, f"{source.schema}://{source.path}") for source in cfg.hydra.runtime.config_sources]
        found = [path for provider, path in sources if (provider, path) not in known and not _is_shipped(path)]
        chosen = [str(override.input_line) for override in overrides if "." not in override.key_or_group]
        found += [line for line in chosen if not _is_inside(line.partition("=")[2])]
        return found if _is_inside(config_name) else [*found, str(config_name)]


def _with_scheme(path: str) -> str:
    return path if "://" in path else f"file://{path}"


def _is_inside(name: str | None) -> bool:
    """Whether the name of a configuration stays in the folder that it is looked for in."""
    return name is None or not (os.path.isabs(name) or ".." in name.split("/"))


def _is_shipped(path: str) -> bool:
    scheme, _, folder = path.rpartition("://")
    return scheme in ("", "file") and os.path.realpath(folder) == os.path.realpath(configs_folder())


def _shipped_loader() -> ConfigLoaderImpl:
    return ConfigLoaderImpl(create_config_search_path(str(configs_folder())))


def _check(cfg: DictConfig, overrides: Sequence[Override], run_mode: RunMode, where: str) -> None:
    """Refuse what only the command line and the shipped files may set.

    Raises:
        ConfigError: the key, where it comes from, and the remedy.
    """
    told = cfg.hydra.overrides
    if len(told.hydra) + len(told.task) != len(overrides):  # a file's come before them, and sweepers would take them
        raise ConfigError(f"hydra.overrides is set by {where}, and is the command line's; remove it there")
    found = _tree(cfg)
    lines = tuple(str(override.input_line) for override in overrides if _is_about_code(override))
    shipped = _compose_shipped("config", lines, run_mode, JobRuntime.instance().get("name"))
    if keys := _differing(found, shipped):
        bare = _compose_shipped(None, lines, run_mode, JobRuntime.instance().get("name"))
        key = min(keys, _differing(found, bare), key=len)[:1]  # of a primary configuration that says nothing of it
        if key:
            raise ConfigError(f"hydra.{printable(key[0])} is set by {where}, and decides what Hydra does; {_REMEDY}")
    _check_help(_leaves(found["hydra"]), where)
    plugins = _plugins(found)
    if plugins not in ([], None, _plugins(shipped)):
        raise ConfigError(f"runtime.plugins={show(plugins)} is set by {where}, and names code to run; {_REMEDY}")
    _check_swept(cfg, _leaves(shipped["hydra"]), where)


def _differing(found: Mapping[str, Any], shipped: Mapping[str, Any]) -> list[str]:
    """Return the keys of Hydra's part that act and differ, those that are set first."""
    left, right = _leaves(found["hydra"]), _leaves(shipped["hydra"])
    keys = [key for key in (*sorted(left), *sorted(right.keys() - left)) if not _is_same(left, right, key)]
    return [key for key in keys if not _is_below(key, (*_HARMLESS, *_FILLED_IN))]


def _is_about_code(override: Override) -> bool:
    """Whether a word of the command line is about Hydra's part, but for where files are found, or about plugins."""
    key = override.key_or_group
    return bool(_OF_HYDRA.match(key) and key != "hydra.searchpath") or bool(_OF_PLUGINS.match(key))


@functools.cache
def _compose_shipped(
    config_name: str | None, overrides: tuple[str, ...], run_mode: RunMode, job_name: str
) -> dict[str, Any]:
    """Compose the shipped files alone (``None``: Hydra's defaults alone); ``job_name`` is part of what is composed."""
    lines = [line for line in overrides if config_name is not None or _OF_HYDRA.match(line.lstrip("+~"))]
    try:
        return _tree(_shipped_loader().load_configuration(config_name, lines, run_mode, validate_sweep_overrides=False))
    except HydraException as error:
        reason = printable(" ".join(str(error).split()), 200)
        raise ConfigError(
            f"{' '.join(overrides)} cannot be composed without files of others ({reason}); choose what comes with "
            "Hydra or this project, or give its keys on the command line"
        ) from error


def _tree(cfg: DictConfig) -> dict[str, Any]:
    """Return plain values, references as they are written."""
    tree = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _leaves(node: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping) or not node:
        return {key: node}
    return {
        name: leaf
        for part, value in node.items()
        for name, leaf in _leaves(value, f"{key}.{part}" if key else str(part)).items()
    }


def _is_same(left: Mapping[str, Any], right: Mapping[str, Any], key: str) -> bool:
    values = left.get(key, _ABSENT), right.get(key, _ABSENT)
    return type(values[0]) is type(values[1]) and values[0] == values[1]


def _is_below(key: str, parents: Sequence[str]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _check_help(leaves: Mapping[str, Any], where: str) -> None:
    """Refuse what could harm the terminal that it is printed on."""
    for key, text in leaves.items():
        bad = next((c for c in str(text) if unicodedata.category(c) == "Cc" and c not in "\n\t"), None)
        if bad is not None and _is_below(key, ("help",)):
            raise ConfigError(f"hydra.{key} of {where} holds the control character {show(bad)}; remove it")


def _plugins(tree: Mapping[str, Any]) -> Any:
    runtime = tree.get("runtime")
    return runtime.get("plugins") if isinstance(runtime, Mapping) else runtime


def _check_swept(cfg: DictConfig, shipped: Mapping[str, Any], where: str) -> None:
    """Refuse ``hydra.sweeper.params`` that would be words of the command line about Hydra or plugins."""
    params = OmegaConf.select(cfg, "hydra.sweeper.params")
    for key, value in params.items() if OmegaConf.is_dict(params) else ():
        for override in OverridesParser.create().parse_overrides([f"{key}={value}"]):
            names = (override.key_or_group, override.package or "")
            named = any(pattern.match(name) for name in names for pattern in (_OF_HYDRA, _OF_PLUGINS))
            if named and shipped.get(f"sweeper.params.{key}") != value:
                raise ConfigError(
                    f"hydra.sweeper.params names {show(key)} in {where}; only the command line may sweep over it"
                )


def check_config_dir(folder: str | None) -> None:
    """Refuse a --config-dir that is no folder.

    Raises:
        ConfigError: there is no such folder.
    """
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(
            f"--config-dir {printable(folder)} is not a folder; name one that holds model/, data/ or other groups"
        )

"""One line for what Hydra refuses on a command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from moepp.config.load import known_keys
from moepp.config.suggest import unknown_key_message
from moepp.errors import ConfigError
from moepp.io.untrusted import printable, why_no_file

_QUOTING = "quote a text with commas, brackets, blanks or equals signs, as 'key=\"a,b\"' or 'key=[\"a=b\"]'"
_FORMS = "write a list as key=[a,b], and names with values as key={name: value}"
# Of Hydra 1.3, short and long.
_HYDRA_OPTIONS = {
    *("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "--resolve", "-p", "--package", "-r", "--run"),
    *("-m", "--multirun", "-sc", "--shell-completion", "-cp", "--config-path", "-cn", "--config-name", "-cd"),
    *("--config-dir", "--experimental-rerun", "-i", "--info"),
}


def explain_hydra_error(error: Exception) -> str:
    """Return one line for an error of Hydra or OmegaConf."""
    from hydra.errors import OverrideParseException

    if isinstance(error, OverrideParseException):
        reason = _one_line(str(error).split("See https://")[0])
        override = error.override.lstrip("+")
        return f"{override!r} cannot be read ({reason}); write key=value, a list as key=[a,b], and {_QUOTING}"
    text = _one_line(error) or _one_line(error.__cause__ or type(error).__name__)
    if match := re.match(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]} gives several values; write a list as key=[a,b], {_QUOTING}, or add -m to sweep over them"
    if match := re.match(r"Sweep parameters '(.+)' requires --multirun", text):
        return f"{match[1]} gives several values; add -m to sweep over them"
    if match := re.search(r"Could not find '([^']+)/([^']*)' Available options in '[^']+': (.*?) Config search", text):
        group, name, choices = match.groups()
        if (unusable := _unusable_file(text, group, name)) is not None:
            return unusable
        own = f"; a file {group}/{name}.yaml of your own is found below --config-dir FOLDER"
        return f"{group}={name} does not exist in configs/{group}; choose one of {', '.join(choices.split())}{own}"
    if (match := re.match(r"Could not override '([^']+)'", text)) and _CAN_BE_ADDED.search(text):
        return unknown_key_message(match[1], known_keys())
    if (match := re.match(r"Error merging override (.+)", text)) and "Cannot merge" in str(error.__cause__):
        return f"{match[1]} is a list where names and values belong, or the other way round; {_FORMS}"
    for pattern, template in _PLAIN:
        if match := re.match(pattern, text):
            return template.format(*match.groups())
    return text


# What Hydra says, and how it is said here.
_PLAIN = (
    (
        r"Cannot find primary config '([^']+)'",
        "--config-name {0} does not exist in configs/ or --config-dir; name one that does",
    ),
    (
        r"Additional config directory '([^']+)' not found",
        "--config-dir {0} is not a folder; name one that holds model/, data/ or other groups",
    ),
    (
        r"Primary config directory not found\. .*'([^']+)'",
        "--config-path {0} is not a folder; name one that holds config.yaml",
    ),
    (
        r"(\S+) appears more than once in the final defaults list",
        "{0} is chosen already; write {0}=NAME without a plus to choose another",
    ),
    (
        r"In '([^']+)': ConfigTypeError .*Cannot merge DictConfig with ListConfig",
        "{0}.yaml holds a list where keys and values belong; write lines of the form KEY: VALUE",
    ),
    (
        r"In '([^']+)': Could not load '([^']+)'\.",
        "{0}.yaml names {1} in its defaults list, which does not exist; correct the list",
    ),
)


def _unusable_file(text: str, group: str, name: str) -> str | None:
    """Return what is wrong with a configuration that lies in one of the folders that Hydra lists, but is no file."""
    for folder in re.findall(r"path=file://(.*?)(?= provider=|$)", text):
        file = Path(folder, group, name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
        if file.is_symlink() or file.exists():
            return f"{group}={name}: {printable(file)} {why_no_file(file)}; put a YAML file there"
    return None


_CAN_BE_ADDED = re.compile(r"To append to your config|Key '[^']+' is not in struct")


def missing_known_key(error: Exception) -> str | None:
    """Return the key of an override that Hydra refused only because no file of configs/ sets it.

    A model file may leave keys to their defaults; such a key is as good as any other, ``++key=value`` sets it.
    """
    match = re.match(r"Could not override '([^']+)'", _one_line(error))
    if match is None:
        return None
    key = match[1]
    return key if any(key == known or key.startswith(f"{known}.") for known in known_keys()) else None


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


def refuse_incomplete_overrides(overrides: Sequence[str]) -> None:
    """Refuse a setting without an equals sign, such as ``train.steps 100``.

    Raises:
        ConfigError: the first such setting, and how it is written.
    """
    for i, override in enumerate(overrides):
        if override.startswith("="):
            raise ConfigError(f"{override!r} cannot be read: it names no key; write key=value")
        if "=" in override or override.startswith("~"):
            continue
        before, after = (overrides[j] if 0 <= j < len(overrides) else "" for j in (i - 1, i + 1))
        if before.endswith("="):
            raise ConfigError(f"{before} {override!r} cannot be read: no blank may follow the equals sign; remove it")
        example = f"{override.strip() or 'key'}={after if after and '=' not in after else 'VALUE'}"
        raise ConfigError(f"{override!r} cannot be read: it has no equals sign; write key=value, as {example}")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())

"""One line for whatever keeps a configuration from being composed, with the file and line that are to blame."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

from moepp.config.command_line import explain_hydra_error
from moepp.errors import ConfigError
from moepp.io.untrusted import MAX_YAML_BYTES, printable, read_bytes


def composition_error(error: Exception) -> ConfigError | None:
    """Return the error in one line if composing a configuration failed, whatever Hydra, OmegaConf or YAML raised.

    Files of configurations are a user's own, and Hydra passes on what reading them raises: errors of the system, of
    text that is not UTF-8, of YAML. ``None``: the error is of something else.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, ConfigError):
        return error
    composing, file = _place_of(error)
    if file is not None:
        return ConfigError(_explain_file_error(error, file))
    if isinstance(error, HydraException | OmegaConfBaseException):
        return ConfigError(explain_hydra_error(error))
    if not composing:
        return None
    if isinstance(error, RecursionError):
        return ConfigError("the defaults lists of configuration files name one another in a circle; break it")
    return ConfigError(f"the configuration cannot be composed: {printable(error)}; correct the file it is of")


def _place_of(error: BaseException) -> tuple[bool, Path | None]:
    """Return whether Hydra was composing when the error arose, and the file that it was reading."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.core_plugins.file_config_source import FileConfigSource

    composing = False
    for raised in _with_causes(error):
        for frame, _ in traceback.walk_tb(raised.__traceback__):
            composing = composing or frame.f_code is ConfigLoaderImpl.load_configuration.__code__
            if frame.f_code is FileConfigSource.load_config.__code__ and "full_path" in frame.f_locals:
                return True, Path(frame.f_locals["full_path"])
    return composing, None


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _explain_file_error(error: Exception, file: Path) -> str:
    """Return one line for what reading one file of configurations raised: "FILE line N: reason; remedy"."""
    from yaml import MarkedYAMLError, YAMLError

    where, remedy = printable(file), "correct the file"
    if isinstance(error, UnicodeDecodeError):
        line, byte = _first_bad_byte(file)
        return f"{where} line {line}: the byte 0x{byte:02x} is not UTF-8 text; save the file as UTF-8"
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"{where} line {error.problem_mark.line + 1}: {printable(error.problem)}; {remedy}"
    if isinstance(error, YAMLError):
        return f"{where} is not YAML: {printable(str(error).splitlines()[0])}; {remedy}"
    if isinstance(error, RecursionError):
        return f"{where} holds too many values inside one another; {remedy}"
    if isinstance(error, OSError) and error.strerror is not None:
        return f"cannot read {where}: {error.strerror}; make it readable, or choose another"
    cause = next((raised for raised in _with_causes(error) if str(raised)), error)
    return f"{where} is no configuration: {printable(' '.join(str(cause).split()) or type(cause).__name__)}; {remedy}"


def _first_bad_byte(file: Path) -> tuple[int, int]:
    """Return line and value of the first byte that is not UTF-8; Hydra reads in pieces and counts within one."""
    content = read_bytes(file, MAX_YAML_BYTES, ConfigError)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1, content[error.start]
    return 1, 0  # mended in the meantime

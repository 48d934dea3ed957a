"""The oldest Python and the oldest packages that run this project, as pyproject.toml declares them.

Read from pyproject.toml itself in a checkout, whose installed metadata may be older than its files, and from the
metadata of the installed package elsewhere. Imports the standard library alone, and nothing that Python 3.9 lacks: it
must run where nothing else does.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

from moepp.errors import VersionError

_PROJECT = "moepp"
_PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
_NAME = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)")
_LOWER_BOUND = re.compile(r">=\s*([0-9][0-9.]*)")
_RELEASE = re.compile(r"v?(?:\d+!)?(\d+(?:\.\d+)*)")


def require_supported_versions() -> None:
    """Refuse a Python or a package that is older than pyproject.toml allows, or that is missing.

    Compares the numbers alone: a builder's 2.9.1a0+abc counts as 2.9.1. Takes milliseconds and imports none of them.

    Raises:
        VersionError: all that are too old or missing, in one line.
    """
    python, bounds = _declared()
    if _is_older(platform.python_version(), python):
        raise VersionError(
            f"Python {platform.python_version()} is older than {python}, the oldest that {_PROJECT} runs on; make an "
            f"environment with a newer one"
        )
    installed = {name: _installed(name) for name in bounds}
    missing = [name for name, version in installed.items() if version is None]
    old = [name for name, version in installed.items() if version is not None and _is_older(version, bounds[name])]
    reasons = [f"{name} {installed[name]} is older than {bounds[name]}" for name in old]
    if missing:
        reasons.append(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed")
    if reasons:
        install = " ".join(f"'{name}>={bounds[name]}'" for name in [*old, *missing])
        raise VersionError(f"{', '.join(reasons)}; pip install {install}")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _declared() -> tuple[str, dict[str, str]]:
    """Return the oldest allowed Python and release of each package, without optional ones."""
    if _PYPROJECT.is_file():
        python, requirements = _read_pyproject()
    else:
        metadata = importlib.metadata.metadata(_PROJECT)
        python, requirements = metadata["Requires-Python"], metadata.get_all("Requires-Dist") or []
    bounds = {}
    for requirement in requirements:
        requirement, _, marker = requirement.partition(";")
        name, bound = _NAME.match(requirement), _LOWER_BOUND.search(requirement)
        if name and bound and not marker.strip():
            bounds[name[1]] = bound[1]
    python_bound = _LOWER_BOUND.search(python or "")
    return python_bound[1] if python_bound else "0", bounds


def _read_pyproject() -> tuple[str, list[str]]:
    text = _PYPROJECT.read_text(encoding="utf-8")
    python = re.search(r'^requires-python = "(.*)"$', text, re.MULTILINE)
    try:
        import tomllib
    except ModuleNotFoundError:  # a Python that is itself too old
        return python[1] if python else "", []
    return python[1] if python else "", tomllib.loads(text)["project"]["dependencies"]


def _is_older(version: str, bound: str) -> bool:
    return _numbers(version) < _numbers(bound)


def _numbers(version: str) -> tuple[int, ...]:
    """2.9.1a0+abc -> (2, 9, 1); zeros at the end make no difference."""
    found = _RELEASE.match(version)
    numbers = [int(number) for number in found[1].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)

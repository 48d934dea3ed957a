"""Where the shipped configurations lie: in a checkout configs/ beside train.py, else inside the package."""

from __future__ import annotations

from pathlib import Path

from moepp.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]


def configs_folder(package: Path = PACKAGE) -> Path:
    """Return the folder that holds config.yaml and its groups.

    In a checkout ``moepp/configs`` is a link to ``configs/``. A copy that follows links, and archives that know none,
    turn it into a second folder, or into a file. Then ``configs/`` counts, which is the one that people edit.

    Raises:
        ConfigError: a second folder that differs from ``configs/``: one of the two edits would be ignored, or packed
            into a wheel.
    """
    root, packaged = package.parent, package / "configs"
    own = root / "configs"
    is_checkout = all((root / name).is_file() for name in ("train.py", "pyproject.toml", "configs/config.yaml"))
    if not is_checkout:
        return packaged
    if packaged.is_dir() and not packaged.samefile(own) and (differing := _differing(own, packaged)):
        raise ConfigError(
            f"{own} and {packaged} are two folders and differ in {differing[0]}, as the link between them was lost in "
            f"copying; keep one: rm -r {packaged} && ln -s ../configs {packaged}"
        )
    return own


def _differing(left: Path, right: Path) -> list[str]:
    """Return the configuration files that are missing in one of two folders, or differ."""
    names = {str(path.relative_to(folder)) for folder in (left, right) for path in folder.rglob("*.yaml")}
    return sorted(name for name in names if _content(left / name) != _content(right / name))


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None

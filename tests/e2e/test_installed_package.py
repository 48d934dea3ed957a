"""The package that pip makes and installs: it has everything, and trains from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train_processes import TINY, records

ROOT = Path(__file__).resolve().parents[2]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel of this checkout is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("moepp", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ("wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source))
    subprocess.run([*PIP, *build], check=True, timeout=200)
    [wheel] = folder.glob("*.whl")
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def test_it_holds_every_file_of_the_package(site: Path) -> None:
    files = {path.relative_to(ROOT) for path in (ROOT / "moepp").rglob("*") if path.is_file()}
    files |= {Path("moepp", path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    wanted = {str(path) for path in files if "__pycache__" not in path.parts}
    assert wanted <= {str(path.relative_to(site)) for path in (site / "moepp").rglob("*")}


def test_it_trains_in_an_empty_folder(site: Path, corpus: str, tmp_path: Path) -> None:
    program = "import sys, moepp; from moepp.cli.main import main; print(moepp.__file__); sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, "train", corpus, *TINY, "train.steps=2", "run.name=first"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site / "moepp"))
    assert [line["step"] for line in records(tmp_path / "runs/first")][-1] == 2

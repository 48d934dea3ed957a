"""Packages and Pythons that are too old or missing are refused in one line, before any of them is imported."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tomllib
from email.message import Message
from pathlib import Path

import pytest

from moepp import versions
from moepp.cli.main import main
from moepp.errors import VersionError

ROOT = Path(__file__).resolve().parents[3]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = [re.split("[>=<; ]", requirement)[0] for requirement in DECLARED["dependencies"]]
PROBE = (
    "import sys; from moepp.cli.main import main; code = main(sys.argv[1:]);"
    "print([name for name in ('torch', 'numpy', 'hydra', 'yaml', 'deepspeed') if name in sys.modules], code)"
)


@pytest.fixture
def installed(monkeypatch):
    """Versions to pretend, by name; None: not installed."""
    pretended: dict[str, str | None] = {}
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = pretended.get(name, "") if name in pretended else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return pretended


def declare(monkeypatch, python: str, *requirements: str) -> None:
    metadata = Message()
    metadata["Requires-Python"] = python
    for requirement in requirements:
        metadata["Requires-Dist"] = requirement
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: metadata)
    monkeypatch.setattr(versions, "_PYPROJECT", Path("no-checkout"))


def test_what_is_installed_here_is_supported():
    versions.require_supported_versions()


def test_every_dependency_declares_a_lower_bound_that_is_read():
    python, bounds = versions._declared()
    assert DECLARED["requires-python"].startswith(f">={python},")
    assert list(bounds) == NAMES and {"torch", "deepspeed", "megatron-core", "hydra-core"} < set(NAMES)
    assert all(
        f"{name}>={bound}," in requirement
        for (name, bound), requirement in zip(bounds.items(), DECLARED["dependencies"], strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_older_package_is_named_with_its_bound_and_remedy(name, installed, capsys):
    installed[name] = "0.0.9"
    bound = versions._declared()[1][name]
    for arguments in (["train", "train.steps=1"], ["prepare", "x"], ["report", "x"], ["train", "-m", "a=1,2"]):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == f"error: {name} 0.0.9 is older than {bound}; pip install '{name}>={bound}'\n"


def test_all_that_is_wrong_is_one_line(installed, capsys):
    installed |= {"torch": "2.8.0+cpu", "numpy": None, "wandb": None}
    bounds = versions._declared()[1]
    assert main(["export", "a", "b"]) == 2
    assert capsys.readouterr().err == (
        f"error: torch 2.8.0+cpu is older than {bounds['torch']}, wandb, numpy are not installed; pip install "
        f"'torch>={bounds['torch']}' 'wandb>={bounds['wandb']}' 'numpy>={bounds['numpy']}'\n"
    )


@pytest.mark.parametrize("version", ["2.9.1", "2.9.1+cu130", "2.9.1a0+34c63.nv25.10", "2.10", "2.13.0", "10.0", "3"])
def test_newer_and_builders_own_versions_pass(version, installed, monkeypatch):
    declare(monkeypatch, ">=3.11,<3.14", "torch<2.15,>=2.9.1")
    installed["torch"] = version
    versions.require_supported_versions()


@pytest.mark.parametrize("version", ["2.9.0", "2.9", "2.8.0+cu128", "1.13.1", "2.9.0a0+git1", "broken", ""])
def test_older_and_unreadable_versions_do_not_pass(version, installed, monkeypatch):
    declare(monkeypatch, ">=3.11,<3.14", "torch<2.15,>=2.9.1")
    installed["torch"] = version
    with pytest.raises(VersionError, match=r"is older than 2\.9\.1"):
        versions.require_supported_versions()


def test_optional_features_are_not_asked_for(installed, monkeypatch):
    declare(monkeypatch, ">=3.11", 'lm-eval>=0.4.13; extra == "eval"', "tqdm>=4.65")
    installed |= {"lm-eval": "0.1", "tqdm": "4.65"}
    versions.require_supported_versions()


def test_an_older_python_is_refused(monkeypatch):
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.12")
    with pytest.raises(VersionError, match=r"Python 3\.10\.12 is older than 3\.11"):
        versions.require_supported_versions()


def test_an_installed_package_reads_its_metadata(monkeypatch):
    expected = versions._declared()
    declare(monkeypatch, DECLARED["requires-python"], *DECLARED["dependencies"])
    assert versions._declared() == expected


def test_train_py_refuses_in_one_line_and_imports_nothing_heavy(tmp_path):
    """Through the metadata of a folder that comes first, as an older installation would."""
    old = tmp_path / "torch-2.8.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.8.0\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    bound = versions._declared()[1]["torch"]
    line = f"error: torch 2.8.0 is older than {bound}; pip install 'torch>={bound}'\n"
    for command in (["-c", PROBE, "eval", "x"], ["train.py", "train.steps=1"]):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
        )
        assert done.stderr == line
        assert (done.returncode, done.stdout) == ((0, "[] 2\n") if command[0] == "-c" else (2, ""))

"""A bare pytest finds every test file."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]


def left_out(files: list[Path], patterns: list[str]) -> list[Path]:
    """Files in a folder whose name pytest does not enter."""
    return [f for f in files if any(fnmatch.fnmatch(part, p) for part in f.parts[:-1] for p in patterns)]


def test_no_folder_of_tests_is_left_out_by_its_name(pytestconfig: pytest.Config) -> None:
    files = [path.relative_to(TESTS) for path in TESTS.rglob("test_*.py")]
    assert {file.parts[0] for file in files} == {"dist", "e2e", "gpu", "unit"}
    assert left_out(files, pytestconfig.getini("norecursedirs")) == []
    assert left_out(files, ["build", "dist"]), "pytest's own default leaves some out"

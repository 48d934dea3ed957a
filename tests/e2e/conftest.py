"""Fixtures of the tests that run the program as a whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.train_processes import TrainServer, write_corpus


@pytest.fixture(scope="session")
def server() -> Iterator[TrainServer]:
    """Starts ``train.py`` on several ranks in no time."""
    with TrainServer() as started:
        yield started


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override that names a tiny corpus."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")

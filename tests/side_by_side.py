"""The cases of a parametrized test that each wait for a process of their own: two at a time.

    def test_it_compiles(architecture, two_at_a_time):       # fixture of tests/conftest.py
        output = two_at_a_time("architecture", compile_for)  # compile_for(architecture), run in a thread

The first case that is run starts the selected cases of its test, in their order. What ``compile_for`` raises,
``pytest.skip`` among it, is raised in the case that it belongs to. It must not touch the state of this process.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

PLACES = 2  # a core for each on the smallest machine that tests are for
Result = TypeVar("Result")


class SideBySide:
    """The started cases of a module's tests."""

    def __init__(self) -> None:
        self._places = ThreadPoolExecutor(PLACES)
        self._started: dict[str, Future[Any]] = {}

    def result(self, item: pytest.Function, argument: str, work: Callable[[Any], Result]) -> Result:
        """``work(value)`` for the value of ``argument`` in ``item``."""
        for other in [item] if item.nodeid in self._started else item.session.items:
            same_test = isinstance(other, pytest.Function) and other.parent is item.parent
            if same_test and other.originalname == item.originalname and other.nodeid not in self._started:
                self._started[other.nodeid] = self._places.submit(work, other.callspec.params[argument])
        return self._started[item.nodeid].result()

    def close(self) -> None:
        """Wait for cases that run; start no other."""
        self._places.shutdown(cancel_futures=True)

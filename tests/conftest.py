"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests are tiny and may run side by side

# Before torch too, which reads once the variables that the package sets.
import moepp  # noqa: F401  # isort: skip

import pytest
import torch

from moepp import cpu
from moepp.errors import ConfigError
from tests.devices import DEVICES, GPU, why_no_gpu
from tests.dist import WorkerPool
from tests.side_by_side import SideBySide

TESTS = Path(__file__).parent
# A bare pytest runs these of tests/dist and tests/e2e; the others start more processes than fit into its minutes.
QUICK = {
    f"dist/test_{name}.py" for name in ("balance_reduction", "gradient_reduction", "groups", "moe_expert_parallel")
}

torch.set_num_threads(1)
if not torch.accelerator.is_available():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a CUDA build of torch without a GPU would be refused
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, by whomever


def pytest_configure() -> None:
    """Refuse a wrong MOEPP_CPU in one line."""
    try:
        cpu.chosen()
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header() -> str:
    """Which CPU kind the tests run on."""
    return f"cpu kind: {cpu.chosen() or 'the whole machine'} ({cpu.VARIABLE})"


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose what the three selections of launch/test.sh have, and skip what needs a GPU where there is none."""
    names_files = config.args_source is pytest.Config.ArgsSource.ARGS
    for item in items:
        folder, *rest = item.path.relative_to(TESTS).parts
        if folder == "dist" and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.exhaustive)
        elif folder in ("dist", "e2e") and "/".join((folder, *rest)) not in QUICK and not names_files:
            item.add_marker(pytest.mark.slow)
    if torch.__version__ < "2.13":
        from moepp.engine.fsdp import why_no_fsdp

        for item in items:
            if "fsdp" in item.name or item.path.name == "test_fsdp.py":
                item.add_marker(pytest.mark.skipif(why_no_fsdp() is not None, reason=str(why_no_fsdp())))
    if GPU is None:
        reason = pytest.mark.skip(reason=why_no_gpu())
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(reason)


@pytest.fixture(params=DEVICES, ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and in a run of its own the GPU where torch can use one."""
    return request.param


@pytest.fixture
def without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where Triton is not told to interpret its kernels.

    Triton is imported before: what it decorates then stays as it was, for all later tests too.
    """
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[int], WorkerPool]]:
    """``pools(n)``: the module's pool of n gloo ranks, started on first use (see tests/dist.py)."""
    started: dict[int, WorkerPool] = {}

    def get(world_size: int) -> WorkerPool:
        return started.setdefault(world_size, WorkerPool(world_size))

    yield get
    for pool in started.values():
        pool.close()


@pytest.fixture(scope="module")
def pool_1(pools: Callable[[int], WorkerPool]) -> WorkerPool:
    """One gloo rank."""
    return pools(1)


@pytest.fixture(scope="module")
def pool_2(pools: Callable[[int], WorkerPool]) -> WorkerPool:
    """Two gloo ranks."""
    return pools(2)


@pytest.fixture(scope="module")
def pool_4(pools: Callable[[int], WorkerPool]) -> WorkerPool:
    """Four gloo ranks."""
    return pools(4)


@pytest.fixture(scope="module")
def _side_by_side() -> Iterator[SideBySide]:
    cases = SideBySide()
    yield cases
    cases.close()


@pytest.fixture
def two_at_a_time(
    request: pytest.FixtureRequest, _side_by_side: SideBySide
) -> Callable[[str, Callable[[Any], Any]], Any]:
    """``two_at_a_time(argument, work)``: what ``work`` gives for this case (see tests/side_by_side.py)."""
    return lambda argument, work: _side_by_side.result(request.node, argument, work)

"""The tests that depend on the CPU, on every kind of CPU that this machine can be: each in a pytest of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moepp import cpu

ROOT = Path(__file__).resolve().parents[3]
QUICK = ("tests/unit/ops/test_cpu.py", "-k", "this_process or hold or float64", "-p", "no:hypothesispytest")
KIND_FILE = "tests/unit/ops/test_cpu.py"  # its tests are skipped where no kind is chosen
CPU_FILES = (
    KIND_FILE,
    "tests/unit/bench/test_bench.py",
    "tests/unit/moe/test_counts_guard.py",
    "tests/unit/ops/test_kernels.py",
    "tests/unit/ops/test_products.py",
    "tests/unit/ops/test_amx_experts.py",
    "tests/unit/ops/test_avx2_experts.py",
)
LAYER_FILES = (
    "tests/unit/ops/test_model_cross_entropy.py",
    "tests/unit/moe/test_moe_contract.py",
)
# Tests that must have run, not been skipped, for a kind to count as tested.
PROOF = {"amx": "test_amx_experts", "avx2": "test_avx2_experts"}


def run_pytest(kind: str, *arguments: str, seconds: float) -> str:
    """The tests that passed; fails with the failures if there are any."""
    if lacks := cpu.missing(kind):
        pytest.skip(f"this machine cannot be {kind}: it has no {', '.join(lacks)}")
    environment = cpu.environment(kind, os.environ)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=seconds, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return "".join(re.findall("^PASSED.*", done.stdout, re.MULTILINE))


def is_this_process(kind: str) -> bool:
    """Whether a kind computes what this process does: the machine's best one where none is chosen."""
    return kind == (cpu.chosen() or next(name for name in cpu.KINDS if not cpu.missing(name)))


@pytest.mark.parametrize("kind", cpu.KINDS)
def test_the_process_keeps_to_and_the_layer_is_right_on(kind, two_at_a_time):
    """The cheap part: 3 s for each kind, most of it to start Python and torch."""
    passed = two_at_a_time("kind", lambda kind: run_pytest(kind, *QUICK, seconds=280))
    assert all(f"test_{name}" in passed for name in ("this_process_keeps_to_its_kind", "the_layer_agrees_with_float64"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", cpu.KINDS)
def test_every_test_that_depends_on_the_cpu_passes_on(kind, request, two_at_a_time):
    """For this process's own kind those alone that ask for a kind, where the same run has all others anyway."""
    config, here = request.config, {item.path for item in request.session.items}
    has_all = not config.option.keyword and here >= {ROOT / file for file in (*CPU_FILES, *LAYER_FILES)}
    own = [kind for kind in cpu.KINDS if has_all and is_this_process(kind)]
    files = {kind: (KIND_FILE,) if kind in own else (*CPU_FILES, *LAYER_FILES) for kind in cpu.KINDS}
    passed = two_at_a_time("kind", lambda kind: run_pytest(kind, *files[kind], seconds=3500))
    assert "test_this_process_keeps_to_its_kind" in passed
    for name, proof in PROOF.items():
        assert (f"{proof}.py::test_outputs_and_all_gradients" in passed) == (name == kind and kind not in own)

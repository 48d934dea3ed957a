"""Check 14: the project's own tests of the layer and of Triton's kernels, on the device."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.gpu.report import Place, Report, Skip, is_installed

ROOT = Path(__file__).resolve().parents[2]


def check_own_tests(place: Place, report: Report) -> None:
    """They take a device: here they run on the CPU and on the GPU."""
    place.require_cuda("on the CPU these tests run by themselves")
    if not is_installed("pytest"):
        raise Skip("the package pytest is not installed")
    kernels = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/unit/ops/test_triton*.py"))
    # Without pyproject.toml's options: they name plugins that may be missing.
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "not slow"]
    done = subprocess.run([*command, "tests/unit/moe", *kernels], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    report_outcome(report, done.returncode, done.stdout)


def report_outcome(report: Report, code: int, output: str) -> None:
    """What pytest said in its last line; no test on the GPU is a failure too."""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)\b", output)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, flags=re.MULTILINE)
    report.expect("exit code of pytest", f"{code} {failed[:3] or ''}".strip(), "0", code == 0)
    report.at_most("tests that passed, at least 100", -counts.get("passed", 0), -100)
    report.note("tests", counts)

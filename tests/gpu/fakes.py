"""Checks that do what checks must not do, for the tests of the script (tests/e2e/test_prove.py)."""

from __future__ import annotations

import os
import time

from tests.gpu.report import Place, Report, Skip


def succeeds(place: Place, report: Report) -> None:
    report.at_most("one", 1.0, 2.0)


def raises(place: Place, report: Report) -> None:
    report.at_most("one", 1.0, 2.0)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def hangs(place: Place, report: Report) -> None:
    time.sleep(600)


def dies(place: Place, report: Report) -> None:
    os.kill(os.getpid(), 9)


def is_left_out(place: Place, report: Report) -> None:
    place.require_cuda("streams")


def expects_nothing(place: Place, report: Report) -> None: ...


def is_left_out_in_part(place: Place, report: Report) -> None:
    report.at_most("one", 1.0, 2.0)
    with report.part("the other half"):
        raise Skip("not here")

"""The checks of the proof as tests, where there is a GPU: ``pytest tests/gpu -m ""``."""

from __future__ import annotations

import pytest

from tests.gpu.checks import CHECKS, Check
from tests.gpu.prove import Proof, line_of

pytestmark = pytest.mark.gpu


@pytest.mark.timeout(600)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.number} {check.title}")
def test_the_check_passes_on_this_gpu(check: Check, tmp_path):
    proof = Proof("cuda", tmp_path)
    failures = proof.run([check])
    [record] = proof.records
    if record["status"] == "skipped":
        pytest.skip("; ".join(record["skipped"]))
    assert not failures, line_of(record)

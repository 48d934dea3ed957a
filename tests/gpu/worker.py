"""Runs some checks of the proof, one after the other, and appends a line of JSON for the beginning and end of each.

A check that raises ends the process: after a CUDA error nothing in it can be trusted. :mod:`tests.gpu.prove` then
starts another one for the rest.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

RAISED = 3  # exit code


def run_check(function: str, place: Any) -> tuple[dict[str, Any], bool]:
    """The record of one check, and whether it raised."""
    from tests.gpu.report import FAILED, Report, Skip

    module, _, name = function.partition(":")
    report, start, raised = Report(), time.perf_counter(), False
    try:
        getattr(importlib.import_module(module), name)(place, report)
        place.synchronize()
    except Skip as reason:
        report.skip(str(reason))
    except Exception as error:
        traceback.print_exc()
        raised = True
        first = (str(error).strip().splitlines() or [""])[0][:300]
        report.expect("the check itself", f"{type(error).__name__}: {first}", "no exception", False)
    record = report.as_record() | {"seconds": round(time.perf_counter() - start, 3)}
    assert not raised or record["status"] == FAILED
    return record, raised


def main(argv: list[str]) -> int:
    """``RESULTS DEVICE NUMBER=MODULE:NAME ...``"""
    results, device, checks = Path(argv[0]), argv[1], [one.split("=", 1) for one in argv[2:]]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS; its products are then deterministic
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    import torch

    from tests.gpu.report import Place

    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    place = Place(torch.device(device))
    with results.open("a", encoding="utf-8", buffering=1) as stream:
        for number, function in checks:
            stream.write(json.dumps({"begins": int(number)}) + "\n")
            record, raised = run_check(function, place)
            stream.write(json.dumps({"number": int(number)} | record) + "\n")
            if raised:
                return RAISED
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Check 16: torch.compile for the dense parts of a model."""

from __future__ import annotations

import torch

from moepp.errors import ConfigError
from moepp.model.compiled import compile_dense_parts, require_compiler
from tests.gpu.models import ModelRun, expect_close, step_model
from tests.gpu.report import Place, Report, Skip

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # other kernels round otherwise


def check_compiled(place: Place, report: Report) -> None:
    """Loss and gradients with compiled attention and norms against those without."""
    backend = "inductor"
    if place.is_cuda:
        try:
            require_compiler(place.device)
        except ConfigError as error:
            raise Skip(str(error)) from error
    else:
        backend = "aot_eager"
        report.skip("generated code: needs CUDA (that of the CPU has a test of its own)")
    for dtype, limit in LIMITS.items():
        size = (2, place.size(512, 8))
        plain, compiled = (ModelRun(place, step_model(place), dtype, *size) for _ in range(2))
        compile_dense_parts(compiled.model, backend)
        expect_close(report, str(dtype).removeprefix("torch."), compiled.step(), plain.step(), limit)

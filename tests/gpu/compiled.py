"""Check 16: torch.compile for the dense parts of a model, with attention within documents too."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters

from moepp.errors import ConfigError
from moepp.model.compiled import compile_dense_parts, require_compiler
from tests.gpu.models import ModelRun, expect_close, step_model
from tests.gpu.report import Place, Report, Skip

END = 7  # of a document, in the batches below
BATCHES = 4
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
    with report.part("attention within documents"):
        _check_documents(place, report, backend)


def _check_documents(place: Place, report: Report, backend: str) -> None:
    """Batches of other documents give what they give uncompiled, and nothing is compiled again for them."""
    size, dtype = (2, place.size(512, 16)), torch.bfloat16
    plain, compiled = (ModelRun(place, step_model(place), dtype, *size) for _ in range(2))
    compile_dense_parts(compiled.model, backend)
    graphs: list[int] = []
    for batch in range(BATCHES):
        generator = torch.Generator().manual_seed(10 + batch)
        ids_BS = torch.randint(END + 1, 200, plain.ids_BS.shape, generator=generator)
        ends_BS = torch.rand(ids_BS.shape, generator=generator) < 0.05 * (batch + 1)
        ids_BS = ids_BS.masked_fill(ends_BS, END).to(place.device)
        for run in (plain, compiled):
            run.model.document_end, run.ids_BS = END, ids_BS
        expect_close(report, f"documents, batch {batch}", compiled.step(), plain.step(), LIMITS[dtype])
        graphs.append(counters["stats"]["unique_graphs"])
    report.equal("graphs compiled after each batch", graphs, graphs[:1] * BATCHES)

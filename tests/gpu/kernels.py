"""Checks 3 to 5: Triton's kernels against torch's operations, waits of the host, equal bits in equal steps.

Shapes: T tokens, D width, R rows, K = 2 experts of a token, F expert width.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moepp.bench.cases import Case
from moepp.bench.peers import one_process_group
from moepp.config import OptimConfig
from moepp.distributed.groups import build_groups
from moepp.distributed.layout import Layout as RankLayout
from moepp.engine.native import NativeEngine
from moepp.moe import ExpertParallel, MoELayer
from moepp.moe.dispatch import AllToAllDispatcher
from moepp.ops import RowOrder, combine_rows, expert_products, gather_rows, use_kernels
from moepp.ops.backend import kernels_for
from moepp.ops.cross_entropy import IGNORE_INDEX
from moepp.ops.swiglu import swiglu
from tests.gpu.layer import kernel_sets
from tests.gpu.models import LayerRun, ModelRun, expect_close, expect_same_bits, step_model
from tests.gpu.report import Place, Report, Skip, is_installed

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
MODEL_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # deviations of two layers
HUGE = 2**31  # elements: offsets beyond it do not fit 32 bits
HUGE_BYTES = 24 * 2**30


def check_kernels(place: Place, report: Report) -> None:
    """The layer with Triton's kernels against torch's operations, at the sizes of real models and at odd ones."""
    if not is_installed("triton"):
        raise Skip("the package triton is not installed")
    for case, num_tokens in _layer_sizes(place):
        for dtype, limit in LIMITS.items():
            run = LayerRun(place, num_tokens, dtype, case)
            with use_kernels("torch"):
                wanted = run.step()
            with use_kernels("triton"):
                found = run.step()
            name = f"{case.name}, T={num_tokens}, {str(dtype).removeprefix('torch.')}"
            expect_close(report, name, found, wanted, limit)
    size = (place.size(2, 1), place.size(512, 8))
    for dtype, limit in MODEL_LIMITS.items():  # cross-entropy and rotary embedding as well
        run = ModelRun(place, step_model(place), dtype, *size)
        with use_kernels("torch"):
            wanted = run.step()
        with use_kernels("triton"):
            found = run.step()
        expect_close(report, f"a model's step, {str(dtype).removeprefix('torch.')}", found, wanted, limit)
    with use_kernels("triton"):
        _check_cross_entropy_again(place, report)
    with report.part("offsets beyond 32 bits"):
        _check_huge(place, report)


def _check_cross_entropy_again(place: Place, report: Report) -> None:
    """Losses and gradients, which take the logits' place, of equal logits again and again: warps must not overtake."""
    tokens, vocab_size = place.size(16_384, 8), place.size(65_536, 5000)
    logits_TV = torch.randn(tokens, vocab_size, device=place.device).to(torch.bfloat16)
    labels_T = torch.randint(vocab_size, (tokens,), device=place.device)
    chosen_T = logits_TV.gather(1, labels_T.unsqueeze(1)).squeeze(1).float()  # before they are overwritten
    wanted_T = torch.cat([part.float().logsumexp(1) for part in logits_TV.split(1024)]) - chosen_T
    kernels = kernels_for(logits_TV)
    assert kernels is not None
    first: tuple[torch.Tensor, torch.Tensor] | None = None
    for _ in range(place.size(50, 2)):
        gradient_TV, losses_T = logits_TV.clone(), torch.empty_like(wanted_T)
        kernels.call("cross_entropy", gradient_TV, labels_T, losses_T, IGNORE_INDEX, 1, tokens, vocab_size)
        first = first or (gradient_TV, losses_T)
        if not (torch.equal(losses_T, first[1]) and torch.equal(gradient_TV, first[0])):
            break  # with the deviation to be reported
    assert first is not None
    report.same_bits("cross-entropy again and again: losses", losses_T, first[1])
    report.same_bits("cross-entropy again and again: gradients", gradient_TV, first[0])
    report.close("cross-entropy of logits gathered before", losses_T, wanted_T, LIMITS[torch.float32])


def _layer_sizes(place: Place) -> list[tuple[Case, int]]:
    if not place.is_cuda:
        return [(Case("2+4", 2, 2, 33, 17), 5)]
    return [
        (Case("8+4", 8, 2, 768, 2048), 8192),
        (Case("32+8", 32, 6, 768, 2048), 4096),
        (Case("7b-16+4", 16, 2, 1536, 4096), 2048),
        (Case("odd", 4, 2, 130, 66), 1001),
    ]


def _check_huge(place: Place, report: Report) -> None:
    """Rows whose last element lies beyond 2^31: sums by token, their gradients, and SwiGLU."""
    place.require_cuda("tensors of more than 2^31 elements")
    free, _ = torch.cuda.mem_get_info()
    if free < HUGE_BYTES:
        raise Skip(f"needs {HUGE_BYTES / 2**30:.0f} GiB of free memory, there are {free / 2**30:.0f}")
    width, last = 1536, slice(-64, None)
    tokens = HUGE // width // 2 + 1024
    positions_TK = torch.arange(2 * tokens, device=place.device).view(tokens, 2)
    order = RowOrder(torch.arange(2 * tokens, device=place.device), positions_TK)
    x_TD = torch.randn(tokens, width, device=place.device, dtype=torch.bfloat16).requires_grad_()
    weights_TK = torch.rand(tokens, 2, device=place.device)
    with use_kernels("triton"):
        rows_RD = gather_rows(x_TD, order)
        out_TD = combine_rows(rows_RD, order, weights_TK)
        out_TD.backward(out_TD.detach())
    wanted = x_TD.detach()[last].float() * weights_TK[last].sum(1, keepdim=True)
    report.close("last sums", out_TD.detach()[last], wanted, LIMITS[torch.bfloat16])
    assert x_TD.grad is not None
    grad = out_TD.detach()[last].float() * weights_TK[last].sum(1, keepdim=True)
    report.close("last gradients", x_TD.grad[last], grad, LIMITS[torch.bfloat16])
    del rows_RD, out_TD, x_TD, grad
    rows = HUGE // (2 * 2816) + 1024
    gate_up_RG = torch.randn(rows, 2 * 2816, device=place.device, dtype=torch.bfloat16)
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=1)
    act_RF = gate_RF.new_empty(rows, 2816)
    with use_kernels("triton"):
        swiglu(gate_RF, up_RF, act_RF)
    wanted = torch.nn.functional.silu(gate_RF[last].float()) * up_RF[last].float()
    report.close("last activations", act_RF[last], wanted, LIMITS[torch.bfloat16])


@contextmanager
def counted_waits(waits: Counter[str]) -> Iterator[None]:
    """Count the places where the host waits for the GPU, as torch's synchronisation debug mode sees them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits.update(sites_of(caught))


def sites_of(caught: list[Any]) -> Counter[str]:
    """``file:line`` of each warning about a synchronisation."""
    return Counter(
        f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchroniz" in str(one.message).lower()
    )


def check_waits(place: Place, report: Report) -> None:
    """Waits of one step of a model of two layers, with all experts here and with the exchange of expert parallelism."""
    place.require_cuda("torch.cuda.set_sync_debug_mode")
    with one_process_group(place.device):
        for kernels in kernel_sets(place, report):
            with use_kernels(kernels):
                _expect_few_waits(place, report, kernels)


def _expect_few_waits(place: Place, report: Report, kernels: str) -> None:
    cfg, dtype = step_model(place), torch.bfloat16
    groups = build_groups(RankLayout(1), place.device)
    native = expert_products(place.device, dtype, cfg.hidden_size, cfg.moe.ffn_hidden_size).is_grouped
    for name, per_layer in (("experts here", 0 if native else 1), ("exchange", 1)):
        run = ModelRun(place, cfg, dtype, 4, 1024)
        if name == "exchange":
            _exchange(run, groups.ep)
        engine = NativeEngine(run.model, groups, OptimConfig(), 1)
        _waits_of_step(run, engine)  # allocates and compiles
        limits = {"forward": per_layer * cfg.num_layers, "backward": 0, "step": 2}
        for part, found in _waits_of_step(run, engine).items():
            label = f"{kernels}, {name}"
            report.at_most(f"{label}: waits in {part} {dict(found) or ''}", float(found.total()), limits[part])
            report.note(f"{label}, {part}", found.total())


def _waits_of_step(run: ModelRun, engine: NativeEngine) -> dict[str, Counter[str]]:
    waits: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter(), "step": Counter()}
    with counted_waits(waits["forward"]):
        loss = run.loss()
    with counted_waits(waits["backward"]):
        engine.backward(loss)
    with counted_waits(waits["step"]):
        engine.step(1e-4)
    return waits


def _exchange(run: ModelRun, group: Any) -> None:
    """Let every layer send its rows to itself through the collectives."""
    for module in run.model.modules():
        if isinstance(module, MoELayer):
            module.dispatcher = AllToAllDispatcher(ExpertParallel(group), module.cfg.num_ffn_experts)


def check_determinism(place: Place, report: Report) -> None:
    """Two equal steps give equal bits; so does a model's whose layers are computed again in backward.

    The layer by itself; a model with torch's deterministic algorithms, because fast attention adds up its gradients in
    any order.
    """
    cfg, size = step_model(place), (place.size(4, 1), place.size(1024, 8))
    for kernels in kernel_sets(place, report):
        with use_kernels(kernels):
            run = LayerRun(place, place.size(8192, 16), torch.bfloat16)
            first = run.step()
            expect_same_bits(report, f"{kernels}, layer again", run.step(), first)
            with deterministic_algorithms():
                plain = ModelRun(place, cfg, torch.bfloat16, *size)
                first = plain.step()
                expect_same_bits(report, f"{kernels}, again", plain.step(), first)
                recomputed = ModelRun(place, cfg, torch.bfloat16, *size, recompute=True)
                expect_same_bits(report, f"{kernels}, recomputed", recomputed.step(), first)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Let torch take them where it has some, and fill new memory with NaN: what is read before it is written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)

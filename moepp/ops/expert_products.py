"""How the matrix products of the FFN experts are computed: one choice per device, dtype and sizes.

Shapes: D width, F expert width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moepp.ops.backend import chosen_kernels
from moepp.ops.cpu.amx_experts import supports_amx
from moepp.ops.cpu.avx2_experts import supports_avx2

# Compute capabilities (major) with a grouped kernel of torch's own (torch 2.11 to 2.13, GroupedBlas.cpp). On others
# torch waits for the row counts and loops over experts, in each of the six products of a layer.
NATIVE_MAJORS = (9, 10)
# What the grouped kernel loads must begin at a multiple of so many bytes: every row, so widths are multiples of 8.
GROUPED_BYTES = 16
GROUPED_MULTIPLE = GROUPED_BYTES // torch.bfloat16.itemsize


@dataclass(frozen=True)
class Hardware:
    """What the choice depends on beside types and sizes.

    Attributes:
        backend: "cuda", "rocm", "cpu", or the name of another kind of device.
        capability: CUDA's compute capability (major, minor), else None.
        has_grouped_mm: whether this torch has ``grouped_mm``.
        cpu_experts: compiled kernels for whole experts on the CPU: "amx", "avx2" or None.
    """

    backend: str
    capability: tuple[int, int] | None = None
    has_grouped_mm: bool = True
    cpu_experts: str | None = None


@dataclass(frozen=True)
class ExpertProducts:
    """A way to compute the experts' products.

    Attributes:
        way: "grouped" (one product for all experts, which reads row counts on the device), "loop" (one expert after
            the other; the host reads the row counts), "amx" or "avx2" (compiled kernels on the CPU).
        triton: whether Triton's kernel computes SwiGLU between the products.
        reason: why nothing faster was taken, or "".
    """

    way: str
    triton: bool = False
    reason: str = ""

    @property
    def is_grouped(self) -> bool:
        """Whether row counts stay on the device."""
        return self.way == "grouped"

    def __str__(self) -> str:
        name = {"grouped": "grouped matmul", "amx": "cpu (AMX)", "avx2": "cpu (AVX2)"}.get(self.way, self.way)
        name = f"triton, {name}" if self.triton else name
        return f"{name} ({self.reason})" if self.reason else name


def choose_products(
    hardware: Hardware,
    dtype: torch.dtype,
    hidden_size: int,
    ffn_hidden_size: int,
    kernels: str = "auto",
    chunk_rows: int | None = None,
) -> ExpertProducts:
    """Choose by the device's abilities alone, the same way on every rank with such a device.

    Args:
        hardware: the device.
        dtype: of rows and weights.
        hidden_size: D.
        ffn_hidden_size: F.
        kernels: ``runtime.kernels`` in force.
        chunk_rows: rows that experts compute at a time; None: all.
    """
    triton = kernels == "triton"
    if hardware.backend == "cpu":
        if hardware.cpu_experts is None:
            return ExpertProducts("loop", triton)
        return ExpertProducts(hardware.cpu_experts)
    reason = _why_no_grouped(hardware, dtype, hidden_size, ffn_hidden_size, chunk_rows)
    return ExpertProducts("loop" if reason else "grouped", triton, reason)


def _why_no_grouped(
    hardware: Hardware, dtype: torch.dtype, hidden_size: int, ffn_hidden_size: int, chunk_rows: int | None
) -> str:
    """Return why torch's grouped product is not taken, or ""."""
    if hardware.backend != "cuda":
        return f"no native grouped matmul on {hardware.backend}"
    if hardware.capability is None or hardware.capability[0] not in NATIVE_MAJORS:
        found = "unknown" if hardware.capability is None else "{}.{}".format(*hardware.capability)
        return f"no native grouped matmul for compute capability {found}"
    if not hardware.has_grouped_mm:
        return f"torch {torch.__version__} has no grouped_mm"
    if dtype != torch.bfloat16:
        return f"no native grouped matmul for {str(dtype).removeprefix('torch.')}"
    for name, size in (("hidden_size", hidden_size), ("ffn_hidden_size", ffn_hidden_size)):
        if size % GROUPED_MULTIPLE:
            return f"{name}={size} is not a multiple of {GROUPED_MULTIPLE}"
    return "" if chunk_rows is None else f"expert_chunk_rows={chunk_rows}"


def expert_products(
    device: torch.device, dtype: torch.dtype, hidden_size: int, ffn_hidden_size: int, chunk_rows: int | None = None
) -> ExpertProducts:
    """Return the way in which experts of these sizes are computed on this device by the kernels chosen."""
    if _grouped_everywhere:
        return ExpertProducts("grouped", chosen_kernels() == "triton")
    if device.type == "cpu":
        rows_0D = torch.empty(0, hidden_size, dtype=dtype)
        cpu_experts = "amx" if supports_amx(rows_0D, ffn_hidden_size) else "avx2" if supports_avx2(rows_0D) else None
        hardware = Hardware("cpu", cpu_experts=cpu_experts)
    else:
        hardware = _accelerator(device)
    return choose_products(hardware, dtype, hidden_size, ffn_hidden_size, chosen_kernels(), chunk_rows)


def takes_device_counts(
    device: torch.device, dtype: torch.dtype, hidden_size: int, ffn_hidden_size: int, chunk_rows: int | None = None
) -> bool:
    """Return whether the products of :func:`expert_products` read row counts on the device."""
    if device.type == "cpu" and not _grouped_everywhere:
        return False
    return expert_products(device, dtype, hidden_size, ffn_hidden_size, chunk_rows).is_grouped


@functools.cache
def _accelerator(device: torch.device) -> Hardware:
    if device.type != "cuda":
        return Hardware(device.type)
    backend = "cuda" if torch.version.hip is None else "rocm"
    return Hardware(backend, torch.cuda.get_device_capability(device), hasattr(F, "grouped_mm"))


_grouped_everywhere = False


@contextmanager
def use_grouped_products() -> Iterator[None]:
    """Compute experts by grouped products inside the block, on every device: torch emulates them on the CPU."""
    global _grouped_everywhere
    before, _grouped_everywhere = _grouped_everywhere, True
    try:
        yield
    finally:
        _grouped_everywhere = before

"""Check 0: which device this is, which versions drive it, and what the project chooses for it."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch

from moepp import ops
from moepp.distributed.device import pick_device
from moepp.metrics.throughput import peak_flops_per_second
from moepp.ops import expert_products
from moepp.ops.matmul import adds_into_float32
from moepp.ops.triton.proven import KERNELS_VERSION
from moepp.training.build import device_name
from tests.gpu.report import Place, Report

NATIVE_GROUPED_MM = (9, 10)  # majors; on others torch emulates the grouped product by a loop that waits for the device


def check_machine(place: Place, report: Report) -> None:
    """The device is found, computes right, and gets the grouped product where it is native."""
    for name, value in describe(place).items():
        report.note(name, value)
    report.equal("device of local rank 0", pick_device(0, "auto" if place.is_cuda else "cpu").type, place.device.type)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(256, 256, generator=generator).to(dtype) for _ in range(2))
        report.close(f"product in {dtype}", a.to(place.device) @ b.to(place.device), a.double() @ b.double(), limit)
    added = adds_into_float32(torch.zeros(1, dtype=torch.bfloat16, device=place.device))
    report.equal("products of bf16 are added in fp32", added, place.is_cuda)
    native = place.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability()[0] in NATIVE_GROUPED_MM
    report.equal("grouped product of bf16", expert_products(place.device, torch.bfloat16, 64, 64).is_grouped, native)
    report.equal("grouped product of fp32", expert_products(place.device, torch.float32, 64, 64).is_grouped, False)


def describe(place: Place) -> dict[str, Any]:
    """What the proof holds for: device, versions, and the ways of computing that were chosen."""
    facts: dict[str, Any] = {"name": device_name(place.device), "python": platform.python_version()}
    facts |= {package: version_of(package) for package in ("torch", "triton", "numpy", "transformers", "deepspeed")}
    if place.is_cuda:
        properties = torch.cuda.get_device_properties(place.device)
        facts |= {
            "capability": list(torch.cuda.get_device_capability(place.device)),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda or torch.version.hip,
            "driver": _driver(),
            "nccl": ".".join(map(str, importlib.import_module("torch.cuda.nccl").version())),
        }
    peak = peak_flops_per_second(facts["name"], "bf16")
    bf16 = torch.bfloat16
    return facts | {
        "bf16 peak": f"{peak / 1e12:g} TFLOP/s" if peak else "not listed: no MFU",
        "kernels": ops.describe(place.device, bf16),
        "experts": str(expert_products(place.device, bf16, 768, 2048)),
        "kernels_version": KERNELS_VERSION,
    }


def version_of(package: str) -> str | None:
    """None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return (done.stdout.split() or [None])[0]

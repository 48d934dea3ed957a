"""Which kernels the operations of this package run: one choice for the process, made when the model is built.

``auto``: kernels compiled for the machine's processor on the CPU; Triton's on GPUs where they have passed the proof
(:mod:`moepp.ops.triton.proven`); torch's operations elsewhere. ``torch``: torch's operations everywhere. ``cpu``: the
compiled kernels, or an error. ``triton``: Triton's kernels, or an error; torch's operations for what they do not cover,
the matrix products above all. All give the same results up to rounding.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moepp.arguments import KERNELS
from moepp.errors import ConfigError
from moepp.ops.cpu.build import ELEMENT_BITS, Library, library
from moepp.ops.triton.proven import is_proven

if TYPE_CHECKING:
    from moepp.ops.triton.kernels import TritonKernels

_KEY = "runtime.kernels"
_chosen = "auto"


def choose_kernels(choice: str, device: torch.device) -> None:
    """Make the choice for this process.

    Args:
        choice: one of ``KERNELS``.
        device: where the model will be.

    Raises:
        ConfigError: these kernels cannot run there.
    """
    global _chosen
    if choice not in KERNELS:
        raise ConfigError(f"{_KEY}={choice} is not one of {', '.join(KERNELS)}; choose one of them")
    if choice == "triton":
        require_triton(device)
    elif choice == "cpu" and device.type != "cpu":
        raise ConfigError(f"{_KEY}=cpu cannot run on {device.type}; set it to auto")
    elif choice == "cpu" and library(torch.float32) is None:
        raise ConfigError(
            f"{_KEY}=cpu, but the kernels could not be compiled (see the warning above); install a C compiler or set "
            "it to auto"
        )
    _chosen = "triton" if choice == "auto" and _has_proven_triton(device) else choice


def _has_proven_triton(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None and is_proven(device)


@contextmanager
def use_kernels(choice: str) -> Iterator[None]:
    """Run operations with these kernels, unchecked, inside the block; to compare them."""
    global _chosen
    before, _chosen = _chosen, choice
    try:
        yield
    finally:
        _chosen = before


def cpu_kernels(tensor: Tensor, dtype: torch.dtype | None = None) -> Library | None:
    """Return the compiled kernels for tensors like this one, or None to use torch's operations.

    These do too while torch.compile traces, and for tensors that hold no memory of their own (fake ones, those of
    ``torch.func``, distributed ones): a tracer sees operations that it knows.

    Args:
        tensor: one of the operation's inputs.
        dtype: of the kernels, where it isn't the tensor's.
    """
    if torch.compiler.is_compiling() or not is_plain(tensor):
        return None
    return cpu_kernels_for(tensor.device, dtype or tensor.dtype)


def is_plain(tensor: Tensor) -> bool:
    """Return whether the tensor holds memory of its own: it is no fake one, and no tracer's."""
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]
    return type(tensor) in (Tensor, torch.nn.Parameter) and not is_wrapped


def cpu_kernels_for(device: torch.device, dtype: torch.dtype) -> Library | None:
    """As :func:`cpu_kernels`."""
    if device.type != "cpu" or dtype not in ELEMENT_BITS or _chosen not in ("auto", "cpu"):
        return None
    return library(dtype)


def require_cpu_kernels(tensor: Tensor) -> Library:
    """Return :func:`cpu_kernels`, which must exist."""
    kernels = cpu_kernels(tensor)
    assert kernels is not None
    return kernels


def require_kernels_for(tensor: Tensor) -> Library | TritonKernels:
    """Return :func:`kernels_for`, which must exist."""
    kernels = kernels_for(tensor)
    assert kernels is not None
    return kernels


def kernels_for(tensor: Tensor) -> Library | TritonKernels | None:
    """Return Triton's kernels where they are chosen; else as :func:`cpu_kernels`."""
    if _chosen != "triton":
        return cpu_kernels(tensor)
    if torch.compiler.is_compiling() or not is_plain(tensor):
        return None
    require_triton(tensor.device)
    if tensor.dtype not in ELEMENT_BITS:
        raise ConfigError(
            f"{_KEY}=triton takes float32 and bfloat16, not {tensor.dtype}; convert the layer and its input"
        )
    return _triton_kernels()


def chosen_kernels() -> str:
    """Return the choice in force, one of ``KERNELS``."""
    return _chosen


def uses_triton() -> bool:
    """Return whether Triton's kernels are chosen."""
    return _chosen == "triton"


def require_triton(device: torch.device) -> None:
    """Raise unless Triton's kernels can run on this device.

    Raises:
        ConfigError: the package is missing, or it has no compiler for the device and is not told to interpret.
    """
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            f"{_KEY}=triton, but the package triton is not installed; pip install 'moepp[triton]' or set it to auto"
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"{_KEY}=triton, but Triton has no compiler for the CPU; set it to auto (or, to try it out slowly, "
            "TRITON_INTERPRET=1 in the environment)"
        )


@functools.cache
def _triton_kernels() -> TritonKernels:
    from moepp.ops.triton.kernels import TritonKernels

    return TritonKernels()


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Return which kernels tensors of this device and dtype use, for reports."""
    if uses_triton():
        return "triton"
    return "compiled" if cpu_kernels_for(device, dtype) else "torch"

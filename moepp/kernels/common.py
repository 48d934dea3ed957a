"""Whether a tensor's kernels are compiled ones, and what several parts of the model need of them."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moepp.errors import ConfigError
from moepp.kernels.build import ELEMENT_BITS, Library, library
from moepp.kernels.products import mm, multiplies_in_float32

if TYPE_CHECKING:
    from moepp.kernels.triton_rows import TritonRows

_allowed: ContextVar[bool] = ContextVar("compiled_kernels_allowed", default=True)


@contextmanager
def torch_only() -> Iterator[None]:
    """Within it nothing runs through compiled kernels (to compare with them)."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def compiled(tensor: Tensor) -> Library | None:
    """The kernels for tensors like this one, or None where torch operations must do."""
    return compiled_for(tensor.device, tensor.dtype)


def compiled_for(device: torch.device, dtype: torch.dtype) -> Library | None:
    """As :func:`compiled`."""
    if device.type != "cpu" or dtype not in ELEMENT_BITS or not _allowed.get():
        return None
    return library(dtype)


def row_kernels(tensor: Tensor, triton: bool) -> Library | TritonRows | None:
    """Kernels for SwiGLU and for sums of rows: Triton's where they are asked for, else as :func:`compiled`."""
    if not triton:
        return compiled(tensor)
    require_triton(tensor.device)
    if tensor.dtype not in ELEMENT_BITS:
        raise ConfigError(
            f"model.moe.triton_kernels=true takes float32 and bfloat16, not {tensor.dtype}; convert the layer and its "
            "input"
        )
    return _triton_rows()


def require_triton(device: torch.device) -> None:
    """Raise unless Triton's kernels can run on this device.

    Raises:
        ConfigError: the package is missing, or it has no compiler for the device and is not told to interpret.
    """
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "model.moe.triton_kernels=true, but the package triton is not installed; pip install 'moepp[triton]' or "
            "set it to false"
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "model.moe.triton_kernels=true, but Triton has no compiler for the CPU; set it to false (or, to try the "
            "kernels out slowly, TRITON_INTERPRET=1 in the environment)"
        )


@functools.cache
def _triton_rows() -> TritonRows:
    from moepp.kernels.triton_rows import TritonRows

    return TritonRows()


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Which kernels tensors of this device and dtype use, for reports."""
    return "compiled" if compiled_for(device, dtype) else "torch"


def describe_experts(device: torch.device, dtype: torch.dtype) -> str:
    """What the FFN experts of this device and dtype are computed by, for reports."""
    kernels = compiled_for(device, dtype)
    if kernels is not None and kernels.has_tiles:
        return "tile registers"
    return "vector registers" if kernels is not None and kernels.has_vector_experts else "torch"


def transpose(tensor_RM: Tensor, out_MR: Tensor) -> None:
    """``out = tensor.t()``; both may have rows that lie apart."""
    if kernels := compiled(tensor_RM):
        strided = (tensor_RM, tensor_RM.stride(0), out_MR, out_MR.stride(0))
        kernels.call("transpose", *strided, *tensor_RM.shape)
    else:
        out_MR.copy_(tensor_RM.t())


def repacks_right_factor(tensor: Tensor) -> bool:
    """Whether this tensor's matmul copies its right factor into another layout each time, and takes the left one as it
    lies but slowly where it is transposed: oneDNN's bfloat16 product on the CPU, as measured."""
    is_bfloat16 = tensor.dtype == torch.bfloat16 and not multiplies_in_float32(tensor)
    return is_bfloat16 and compiled(tensor) is not None


def dense_transpose(tensor_RM: Tensor) -> Tensor:
    """The transposed matrix as a product's left factor: dense where the product wants it so, else as a view."""
    if not repacks_right_factor(tensor_RM):
        return tensor_RM.t()
    num_rows, width = tensor_RM.shape
    # Caches take rows badly that lie a large power of 2 apart.
    padded_MR = tensor_RM.new_empty(width, num_rows + 32 if num_rows % 256 == 0 else num_rows)
    padded_MR[:, num_rows:] = 0  # oneDNN reads a left factor up to a multiple of 32, and multiplies by zeros
    dense_MR = padded_MR[:, :num_rows]
    transpose(tensor_RM, dense_MR)
    return dense_MR


def matmul_transposed(left_RM: Tensor, right_RN: Tensor, out_MN: Tensor) -> None:
    """``out = leftᵀ right``."""
    mm(dense_transpose(left_RM), right_RN, out_MN)

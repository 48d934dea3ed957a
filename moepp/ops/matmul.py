"""Matrix products, in the precision in which the device has them.

oneDNN multiplies bfloat16 on CPUs from AVX-512 on. On others torch falls back to loops that take seven times as long as
float32's product, in backward a hundred times (measured with AVX2). There bfloat16 factors are multiplied in float32
and the result is rounded: the same sums, as bfloat16 products are summed in float32 anyway.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp import cpu
from moepp.ops.backend import cpu_kernels


def multiplies_in_float32(tensor: Tensor) -> bool:
    """Return whether products of tensors like this one are computed in float32 and rounded."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not _cpu_has_bfloat16()


_bfloat16: bool | None = None  # not functools.cache, which torch.compile looks through with a warning


def _cpu_has_bfloat16() -> bool:
    global _bfloat16
    if _bfloat16 is None:
        kind = cpu.chosen()
        # Not every release of torch looks at the variables.
        narrow = kind is not None and not cpu.KINDS[kind].multiplies_bfloat16
        _bfloat16 = not narrow and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return _bfloat16


def mm(left_MK: Tensor, right_KN: Tensor, out_MN: Tensor) -> None:
    """``out = left @ right``, without autograd."""
    if multiplies_in_float32(left_MK):
        out_MN.copy_(torch.mm(left_MK.float(), right_KN.float()))
    else:
        torch.mm(left_MK, right_KN, out=out_MN)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for [..., D] and [N, D]."""
    return _Float32Linear.apply(x, weight) if multiplies_in_float32(x) else F.linear(x, weight)


class _Float32Linear(torch.autograd.Function):
    """Keeps x and the weight for backward as they are, not their float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grad.float()
        wants_x, wants_weight = ctx.needs_input_grad
        grad_x = (grad @ weight.float()).to(x.dtype) if wants_x else None
        if not wants_weight:
            return grad_x, None
        return grad_x, (grad.flatten(0, -2).t() @ x.float().flatten(0, -2)).to(weight.dtype)


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in float32 at least, whatever the dtypes and autocast."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device.type):
        return F.linear(x.to(dtype), weight.to(dtype))


def multiplies_into_float32(left: Tensor, right: Tensor) -> bool:
    """Return whether :func:`mm_fp32` takes these factors: of one lower precision, on a device that can."""
    return left.dtype == right.dtype and adds_into_float32(left)


def mm_fp32(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """``left @ right`` in float32 from factors of a lower precision, without copies of them and without autograd."""
    return torch.mm(left_MK, right_KN, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]


def add_linear_fp32(start: Tensor, x: Tensor | None, weight: Tensor) -> Tensor:
    """Return ``start + x @ weight.T`` in float32 at least; ``start`` is that already. One launch on accelerators.

    ``x`` None stands for zeros: the weight gets a gradient of zeros.
    """
    if x is None:
        return _AddNothing.apply(start, weight)
    if cpu_kernels(start) or x.dtype != start.dtype:
        return start + linear_fp32(x, weight)
    with without_autocast(x.device.type):
        return torch.addmm(start, x, weight.to(start.dtype).t())


class _AddNothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return start.view_as(start)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, torch.zeros_like(ctx.saved_tensors[0])


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a block within which products keep the precision of their factors."""
    has_autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if has_autocast else nullcontext()


def transpose(tensor_RM: Tensor, out_MR: Tensor) -> None:
    """``out = tensor.t()``; both may have rows that lie apart."""
    if kernels := cpu_kernels(tensor_RM):
        strided = (tensor_RM, tensor_RM.stride(0), out_MR, out_MR.stride(0))
        kernels.call("transpose", *strided, *tensor_RM.shape)
    else:
        out_MR.copy_(tensor_RM.t())


def repacks_right_factor(tensor: Tensor) -> bool:
    """Return whether a product of such tensors copies its right factor and is slow for a transposed left one.

    oneDNN's bfloat16 product on the CPU repacks B in every call, and is slow for a transposed A (measured).
    """
    is_bfloat16 = tensor.dtype == torch.bfloat16 and not multiplies_in_float32(tensor)
    return is_bfloat16 and cpu_kernels(tensor) is not None


def dense_transpose(tensor_RM: Tensor) -> Tensor:
    """Return the transpose as a product's left factor: contiguous if oneDNN prefers it, else a view."""
    if not repacks_right_factor(tensor_RM):
        return tensor_RM.t()
    num_rows, width = tensor_RM.shape
    # Strides of a large power of 2 alias in the caches.
    padded_MR = tensor_RM.new_empty(width, num_rows + 32 if num_rows % 256 == 0 else num_rows)
    padded_MR[:, num_rows:] = 0  # oneDNN reads a left factor up to a multiple of 32, and multiplies by zeros
    dense_MR = padded_MR[:, :num_rows]
    transpose(tensor_RM, dense_MR)
    return dense_MR


def matmul_transposed(left_RM: Tensor, right_RN: Tensor, out_MN: Tensor) -> None:
    """``out = leftᵀ right``."""
    mm(dense_transpose(left_RM), right_RN, out_MN)


def add_transposed_product(sum_MN: Tensor, left_RM: Tensor, right_RN: Tensor) -> None:
    """``sum += leftᵀ right`` into a sum of at least float32.

    Products of a lower precision are added in float32 by the device where it can; elsewhere each is rounded once.
    """
    if sum_MN.dtype == left_RM.dtype:
        torch.addmm(sum_MN, left_RM.t(), right_RN, out=sum_MN)
    elif adds_into_float32(left_RM):
        torch.addmm(sum_MN, left_RM.t(), right_RN, out_dtype=torch.float32, out=sum_MN)  # pyright: ignore[reportCallIssue]
    else:
        product_MN = torch.empty_like(sum_MN, dtype=left_RM.dtype)
        matmul_transposed(left_RM, right_RN, product_MN)
        sum_MN += product_MN


def adds_into_float32(tensor: Tensor) -> bool:
    """Return whether products of such tensors can be float32, or be added to such a matrix, without being rounded."""
    if tensor.device.type == "cpu" or tensor.dtype not in (torch.bfloat16, torch.float16):
        return False
    return _adds_into_float32(tensor.device, tensor.dtype)


@functools.cache
def _adds_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Found out by one product: which devices, releases and builds of torch can is written down nowhere."""
    factor, total = torch.full((16, 16), 1 / 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, factor.t(), factor, out_dtype=torch.float32, out=total)  # pyright: ignore[reportCallIssue]
        product = mm_fp32(factor, factor.t())
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return bool((total == 1 + 1 / 16).all() & (product == 1 / 16).all()) and product.dtype == torch.float32

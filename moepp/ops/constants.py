"""Small tensors that are the same in every call, made once per device: each is a launch less in every layer.

They are never written to. They are made without a wait of the host, and made anew where one must not outlive the call:
while torch.compile traces, for fake tensors, and while a CUDA graph is captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from moepp.ops.backend import is_plain

_KEPT = 64  # of each kind: runs have few shapes, evaluation has more


def numbers(count: int, like: Tensor, dtype: torch.dtype = torch.int64, step: int = 1) -> Tensor:
    """Return 0, step, 2·step, … as ``count`` numbers on the device of ``like``."""
    return _constant(_make_numbers, like, count, step, dtype)


def blocks(values: tuple[float, ...], lengths: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return each value as often as its length says, one after the other, on the device of ``like``."""
    return _constant(_make_blocks, like, values, lengths, dtype)


def _make_numbers(device: torch.device, count: int, step: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(0, count * step, step, dtype=dtype, device=device)


def _make_blocks(
    device: torch.device, values: tuple[float, ...], lengths: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    parts = zip(values, lengths, strict=True)
    return torch.cat([torch.full((length,), value, dtype=dtype, device=device) for value, length in parts])


def _constant(make: Callable[..., Tensor], like: Tensor, *arguments: object) -> Tensor:
    if torch.compiler.is_compiling() or not is_plain(like) or _is_captured(like):
        return make(like.device, *arguments)
    return _keep(make, like.device, *arguments)


@functools.lru_cache(_KEPT)
def _keep(make: Callable[..., Tensor], device: torch.device, *arguments: object) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode could not be used in training
        return make(device, *arguments)


def _is_captured(like: Tensor) -> bool:
    return like.is_cuda and torch.cuda.is_current_stream_capturing()

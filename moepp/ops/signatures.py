"""What every kernel takes, and a check before it runs: a kernel sees addresses, and would read or write any memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# e: tensor of the element type, f: of float32, i: of int64, n: number; "?": or None; "~": its rows may lie apart.
SIGNATURES = {
    "swiglu": "e~ n e~ n e~ n n n",
    "swiglu_backward": "e e e e n n",
    "transpose": "e~ n e~ n n n",
    "combine": "e i f? e? e n n n",
    "combine_backward": "e e i f e f n n n",
    "project": "e f f n n n",
    "project_backward": "e f f e? e f n n n",
    "gates": "f f i f n n n n n",
    "gates_backward": "f i f f? f f n n n n n",
    "affine_experts": "e i f f e e f n n n n n n",
    "affine_experts_backward": "e e i f f e f e? e f f f n n n n n n",
    "count_experts": "i i n n",
    "sort_assignments": "i i i i n n",
    "cross_entropy": "e i f n n n n",
    "amx_expert_forward": "e e e e? e? n n n",
    "amx_expert_backward": "e e e e e e~ e n n n n n",
    "avx2_expert_forward": "e e e e? e? f n n n n",
    "avx2_expert_backward": "e e e e e e e e f? f? f n n n",
    # Triton's alone:
    "gather": "e i e n n n",
    "rotate": "e~ e~ e~ e~ n",
}
TRITON_ONLY = ("gather", "rotate")


class Argument(NamedTuple):
    """One argument of a kernel."""

    is_number: bool
    dtype: torch.dtype | None  # of a tensor; None: the element type
    may_lie_apart: bool
    is_optional: bool


_DTYPES = {"e": None, "f": torch.float32, "i": torch.int64, "n": None}
_ARGUMENTS = {
    name: tuple(Argument(word == "n", _DTYPES[word[0]], "~" in word, "?" in word) for word in signature.split())
    for name, signature in SIGNATURES.items()
}


def check_arguments(
    name: str, arguments: Sequence[Tensor | int | None], element: torch.dtype, device: torch.device
) -> None:
    """Refuse what the kernel would misread; all in Python, nothing waits for the device.

    Args:
        name: of the kernel.
        arguments: as it gets them.
        element: the element type of its tensors.
        device: where they have to be.

    Raises:
        TypeError: a missing argument, or one of another kind, dtype, device or memory layout: a fault of the caller's.
    """
    wanted = _ARGUMENTS[name]
    if len(arguments) != len(wanted):
        raise TypeError(f"kernel {name} takes {len(wanted)} arguments and was given {len(arguments)}")
    for number, (argument, value) in enumerate(zip(wanted, arguments, strict=True), 1):
        is_number, dtype, may_lie_apart, is_optional = argument
        if is_number:
            is_right = type(value) is int
        elif isinstance(value, Tensor):
            is_right = value.dtype is (dtype or element) and value.device == device
            is_right = is_right and (value.is_contiguous() or (may_lie_apart and value.stride(-1) == 1))
        else:
            is_right = value is None and is_optional
        if not is_right:
            rows = "each row" if may_lie_apart else "all"
            remedy = "an integer" if is_number else f"a tensor of {dtype or element} on {device}, {rows} contiguous"
            raise TypeError(f"argument {number} of kernel {name} is {_describe(value)}; pass {remedy}")


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} on {value.device}, shape {list(value.shape)}, strides {list(value.stride())}"

"""What every kernel takes, and a check before it runs: a kernel sees addresses, and would read or write any memory."""

from __future__ import annotations

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

    is_tensor: bool
    dtype: torch.dtype | None  # of the tensor; None: the element type
    may_lie_apart: bool
    is_optional: bool


_DTYPES = {"e": None, "f": torch.float32, "i": torch.int64, "n": None}
_ARGUMENTS = {
    name: tuple(Argument(word[0] != "n", _DTYPES[word[0]], "~" in word, "?" in word) for word in signature.split())
    for name, signature in SIGNATURES.items()
}


def check_arguments(
    name: str, arguments: tuple[Tensor | int | None, ...], element: torch.dtype, device: torch.device
) -> None:
    """Refuse what the kernel would misread; all in Python, nothing waits for the device.

    Args:
        name: of the kernel.
        arguments: as it gets them.
        element: the element type of its tensors.
        device: where they have to be.

    Raises:
        TypeError: an argument of another kind, dtype, device or memory layout: a fault of the calling code.
    """
    for number, (wanted, value) in enumerate(zip(_ARGUMENTS[name], arguments, strict=True), 1):
        if not wanted.is_tensor:
            if not isinstance(value, int):
                raise TypeError(f"argument {number} of kernel {name} is {type(value).__name__}; pass a number")
        elif not isinstance(value, Tensor):
            if value is not None or not wanted.is_optional:
                raise TypeError(f"argument {number} of kernel {name} is {type(value).__name__}; pass a tensor")
        elif value.dtype != (wanted.dtype or element) or value.device != device or not _fits(value, wanted):
            raise TypeError(
                f"argument {number} of kernel {name} is {value.dtype} on {value.device}, shape {list(value.shape)}, "
                f"strides {list(value.stride())}; pass {wanted.dtype or element} on {device}, "
                f"{'rows' if wanted.may_lie_apart else 'all'} contiguous"
            )


def _fits(value: Tensor, wanted: Argument) -> bool:
    """Return whether the elements lie as the kernel reads them."""
    return value.is_contiguous() or (wanted.may_lie_apart and value.stride(-1) == 1)

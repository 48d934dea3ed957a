"""Triton's kernels by name.

They compute what the C functions of the same names do, with the same arguments. Import this module only where Triton is
wanted: it needs the package. With TRITON_INTERPRET=1 in the environment before that, they run on the CPU, slowly.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moepp.ops.signatures import check_arguments
from moepp.ops.triton.affine_experts import affine_experts, affine_experts_backward
from moepp.ops.triton.cross_entropy import cross_entropy
from moepp.ops.triton.gates import gates, gates_backward
from moepp.ops.triton.permute import combine, combine_backward, gather
from moepp.ops.triton.rotary import rotate
from moepp.ops.triton.swiglu import swiglu, swiglu_backward

_FUNCTIONS: tuple[Callable[..., None], ...] = (
    affine_experts,
    affine_experts_backward,
    combine,
    combine_backward,
    cross_entropy,
    gates,
    gates_backward,
    gather,
    rotate,
    swiglu,
    swiglu_backward,
)
KERNELS: dict[str, Callable[..., None]] = {function.__name__: function for function in _FUNCTIONS}


class TritonKernels:
    """The kernels, to be called as those of a compiled :class:`~moepp.ops.cpu.build.Library`."""

    def call(self, name: str, *arguments: Tensor | int | None) -> None:
        """Run a kernel on the device of its first tensor, which is of the element type or float32.

        Raises:
            TypeError: see :func:`moepp.ops.signatures.check_arguments`.
        """
        first = arguments[0]
        assert isinstance(first, Tensor)
        check_arguments(name, arguments, first.dtype, first.device)
        KERNELS[name](*arguments)

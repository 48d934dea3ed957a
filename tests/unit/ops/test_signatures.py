"""Kernels see addresses: what they would misread is an error before they run, whichever argument it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moepp import ops
from moepp.ops.backend import cpu_kernels
from moepp.ops.cpu import build
from moepp.ops.signatures import SIGNATURES, TRITON_ONLY, check_arguments

CPU, META = torch.device("cpu"), torch.device("meta")
BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = {"e": BF16, "f": FP32, "i": torch.int64}
C_TYPES = {"element": "e", "char": "e", "float": "f", "i64": "i"}  # of pointers; numbers are i64


def prototypes() -> dict[str, list[str]]:
    """Read the kinds of arguments out of the C files."""
    text = "".join(path.read_text() for path in sorted(Path(build.__file__).parent.glob("*.c")))
    found = {}
    for name, parameters in re.findall(r"^void (\w+)\(([^)]*)\)", text, re.MULTILINE):
        words = [re.sub(r"\bconst\b", "", each).strip() for each in parameters.split(",")]
        found[name] = [C_TYPES[word.split()[0]] if "*" in word else "n" for word in words]
    return found


def test_table_is_what_the_c_files_say():
    table = {name: [word[0] for word in text.split()] for name, text in SIGNATURES.items() if name not in TRITON_ONLY}
    assert table == prototypes()


def fitting(name: str) -> list[torch.Tensor | int]:
    words = SIGNATURES[name].split()
    return [4 if word == "n" else torch.zeros(4, 4, dtype=DTYPES[word[0]]) for word in words]


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_argument_of_a_kernel_is_checked(name):
    check_arguments(name, tuple(fitting(name)), BF16, CPU)
    wrong: list[object]
    for number, word in enumerate(SIGNATURES[name].split()):
        if word == "n":
            wrong = [None, torch.zeros(4, 4), 4.0]
        else:
            right = torch.zeros(4, 4, dtype=DTYPES[word[0]])
            wrong = [right.to(dtype) for dtype in (BF16, FP32, torch.float64, torch.int32) if dtype != right.dtype]
            wrong += [right.t()[:, :2], right.to(META), right.tolist(), 0]
            apart = right[:, :3]
            if "~" in word:
                arguments = fitting(name)
                arguments[number] = apart
                check_arguments(name, tuple(arguments), BF16, CPU)
            else:
                wrong.append(apart)
            if "?" in word:
                arguments = [None if each == number else value for each, value in enumerate(fitting(name))]
                check_arguments(name, tuple(arguments), BF16, CPU)
            else:
                wrong.append(None)
        for value in wrong:
            arguments: list[Any] = fitting(name)
            arguments[number] = value
            with pytest.raises(TypeError, match=f"argument {number + 1} of kernel {name} is "):
                check_arguments(name, tuple(arguments), BF16, CPU)
    with pytest.raises(TypeError, match=f"kernel {name} takes "):
        check_arguments(name, tuple(fitting(name)[:-1]), BF16, CPU)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_compiled_kernels_check_before_they_run(dtype):
    library = cpu_kernels(torch.empty(0, dtype=dtype))
    if library is None:
        pytest.skip("no compiled kernels")
    gate, act = torch.ones(4, 8, dtype=dtype), torch.full((4, 8), 7.0, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"argument 5 of kernel swiglu is torch\.float64 on cpu"):
        library.call("swiglu", gate, 8, gate, 8, act, 8, 4, 8)
    assert (act == 7).all()


@pytest.mark.parametrize("wrong", [-1, -(2**62), 5, 2**62])
def test_experts_that_do_not_exist_are_left_out_and_touch_no_memory(wrong):
    keys = torch.tensor([[0, wrong], [2, 1], [wrong, 2]])
    library = cpu_kernels(keys, FP32)
    if library is None:
        pytest.skip("no compiled kernels")
    assert ops.count_experts(keys.flatten(), 3).tolist() == [1, 1, 2]
    order = ops.sort_assignments(keys, 3)
    assert order.counts_E.tolist() == [1, 1, 2]
    assert order.assignments_A[:4].tolist() == [0, 3, 2, 5]
    assert order.positions_TK.tolist() == [[0, -1], [2, 1], [-1, 3]]


def test_assignments_in_a_column_of_a_wider_tensor_are_sorted_as_they_are():
    wide = torch.tensor([[2, 7], [0, 7], [1, 7], [2, 7]])
    order = ops.sort_assignments(wide[:, :1], 3)
    assert order.counts_E.tolist() == [1, 1, 2] and order.assignments_A[:4].tolist() == [1, 2, 0, 3]
    assert order.positions_TK.tolist() == [[2], [0], [1], [3]]

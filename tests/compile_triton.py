"""Compiles Triton's kernels to machine code for NVIDIA GPUs of a compute capability; prints the name of each.

It needs no GPU: Triton brings its compiler. `python -m tests.compile_triton 90`
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moepp.ops.triton import rows as triton_rows

# Types of arguments: bfloat16, float32 and int64 in memory; None and constants of a kernel are compiled into it.
ELEMENTS, FLOATS, INTEGERS, NUMBER = "*bf16", "*fp32", "*i64", "i32"
ROWS = {
    "gate": ELEMENTS,
    "gate_stride": NUMBER,
    "up": ELEMENTS,
    "up_stride": NUMBER,
    "act": ELEMENTS,
    "act_stride": NUMBER,
}
SUMS = {"rows": ELEMENTS, "positions": INTEGERS, "weights": FLOATS}
GRADS = {"grad_rows": ELEMENTS, "grad_weights": FLOATS}
SUM_SIZES = {"K": 2, "BLOCK": 1024}
CASES: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    ("swiglu", {**ROWS, "F": NUMBER}, {"BLOCK": 1024}),
    (
        "swiglu_backward",
        {"gate_up": ELEMENTS, "grad_act": ELEMENTS, "grad_gate_up": ELEMENTS, "act": ELEMENTS, "F": NUMBER},
        {"act": None, "BLOCK": 1024},
    ),
    ("combine", {**SUMS, "start": ELEMENTS, "out": ELEMENTS, "D": NUMBER}, SUM_SIZES),
    (
        "combine",
        {**SUMS, "start": ELEMENTS, "out": ELEMENTS, "D": NUMBER},
        {"weights": None, "start": None} | SUM_SIZES,
    ),
    ("combine_backward", {"grad": ELEMENTS, **SUMS, **GRADS, "D": NUMBER}, SUM_SIZES),
]


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    for name, types, constants in CASES:
        signature = types | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=getattr(triton_rows, f"_{name}"), signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=target)
        assert len(compiled.asm["cubin"]) > 0
        print(name)


if __name__ == "__main__":
    main()

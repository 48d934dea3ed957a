"""Compiles Triton's kernels to machine code for NVIDIA GPUs of a compute capability; prints the name of each.

It needs no GPU: Triton brings its compiler. `python -m tests.compile_triton 90`
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moepp.ops.triton import affine_experts, cross_entropy, gates, permute, rotary, swiglu

# Types of arguments: elements of the model, float32 and int64 in memory; None and constants are compiled into it.
FLOATS, INTEGERS, NUMBER = "*fp32", "*i64", "i32"


def cases(element: str) -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Every kernel with the types of its arguments and its constants."""

    def many(kind: str, names: str) -> dict[str, str]:
        return dict.fromkeys(names.split(), kind)

    block = {"BLOCK": 256}
    strided = many(element, "gate up act") | many("i64", "gate_stride up_stride act_stride") | {"F": NUMBER}
    yield swiglu._swiglu, strided, {"BLOCK": 1024}
    backward = many(element, "gate_up grad_act grad_gate_up act") | {"F": NUMBER}
    yield swiglu._swiglu_backward, backward, block
    yield swiglu._swiglu_backward, backward, {"act": None, **block}
    yield permute._gather, many(element, "x out") | {"assignments": INTEGERS, "D": NUMBER}, {"K": 2, **block}
    sums = many(element, "rows start out") | {"positions": INTEGERS, "weights": FLOATS, "D": NUMBER}
    yield permute._combine, sums, {"K": 2, **block}
    yield permute._combine, sums, {"K": 3, "weights": None, "start": None, **block}
    grads = many(element, "grad rows grad_rows") | many(FLOATS, "weights grad_weights")
    yield permute._combine_backward, grads | {"positions": INTEGERS, "D": NUMBER}, {"K": 2, **block}
    tile = {"K": 3, "ROWS": 128, "EXPERTS": 16}
    sizes = many(NUMBER, "T E first_zero")
    for normalization in range(3):
        forward = many(FLOATS, "logits probs weights") | {"ids": INTEGERS}
        yield gates._gates, forward | sizes, {"NORMALIZATION": normalization, "CHOICES": 4, **tile}
        backward = many(FLOATS, "probs weights grad_probs grad_weights grad_logits") | {"ids": INTEGERS}
        without = {"grad_probs": None} if normalization == 1 else {}
        yield gates._gates_backward, backward | sizes, {"NORMALIZATION": normalization, **tile, **without}
    affine = many(element, "x values") | many(FLOATS, "weights difference alphas") | {"ids": INTEGERS}
    affine |= many(NUMBER, "D C first stop")
    yield affine_experts._affine_experts, affine | {"out": element}, {"K": 2, "CHOICES": 2, **block}
    affine |= many(element, "grad sum_x grad_x slopes coefficients") | {"grad_weights": FLOATS}
    for constants, without in ((4, {}), (0, {"sum_x": None})):
        chosen = {"K": 2, "CHOICES": 2, "CONSTANTS": constants}
        yield affine_experts._affine_experts_backward, affine, {**chosen, **block, **without}
    losses = {"logits": element, "labels": INTEGERS, "losses": FLOATS, "ignore": NUMBER, "V": NUMBER}
    for with_gradient in (True, False):
        yield cross_entropy._cross_entropy, losses, {"WITH_GRADIENT": with_gradient, "BLOCK": 4096}
    strides = many("i64", "x_b x_h x_s out_b out_h out_s angle_b angle_s")
    angles = many(element, "x cos sin out") | many(NUMBER, "sign S H h") | strides
    yield rotary._rotate, angles, {"HEADS": 16, "HALF": 32}


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    for element in sys.argv[2:] or ("*bf16",):
        for kernel, types, constants in cases(element):
            signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
            compiled = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=target)
            assert len(compiled.asm["cubin"]) > 0
            print(kernel.__name__.removeprefix("_"), flush=True)


if __name__ == "__main__":
    main()

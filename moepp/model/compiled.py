"""torch.compile for the dense parts of a model: attention, norms and dense FFNs (``runtime.compile``).

The MoE layer is left out: how many rows an expert gets changes in every call, and its operations are fused already.
Compiled parts share the model's parameters, whose names stay.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from moepp.distributed.sequence import SequenceParallel
from moepp.errors import ConfigError
from moepp.model.transformer import Transformer, TransformerLayer
from moepp.ops import multiplies_in_float32

_KEY = "runtime.compile"


def compile_dense_parts(model: Transformer, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the model's dense parts in place; each is compiled at its first call.

    All layers share what was compiled. A new batch size compiles once more, for any size; after torch's limit of such
    attempts the part runs uncompiled. With a cache of keys and values attention is never compiled. Where ranks share
    sequences, what attention says to other ranks is not compiled, but what lies between.

    Args:
        backend: of ``torch.compile``.
    """
    multiplies_in_float32(next(model.parameters()))  # found out now, not while torch traces
    between = _left_uncompiled(model.sequence)  # one for all layers: each other object would be compiled for
    for layer in model.layers:
        if not isinstance(layer, TransformerLayer):
            continue  # held by another rank
        layer.self_attn.sequence = between
        layer.compiled_attend = torch.compile(layer.attend, backend=backend)
        if not layer.is_moe:
            layer.mlp.compile(backend=backend)
    if model.part.has_head:
        model.norm.compile(backend=backend)


def _left_uncompiled(sequence: SequenceParallel) -> SequenceParallel:
    """Return the same, whose collectives run as they are while what lies between them is compiled."""
    if sequence.size == 1:
        return sequence
    left = copy.copy(sequence)
    names = ("gather_tensor", "sum_scatter_tensor") if sequence.tensor_size > 1 else ()
    names += ("gather_context", "scatter_heads", "gather_heads") if sequence.context_size > 1 else ()
    for name in names:
        object.__setattr__(left, name, torch.compiler.disable(getattr(sequence, name)))  # it is frozen
    return left


def require_compiler(device: torch.device) -> None:
    """Raise unless torch.compile works for this device; found out by compiling a small function.

    Raises:
        ConfigError: it does not.
    """
    remedy = f"or set {_KEY} to false"
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
        raise ConfigError(
            f"{_KEY}=true needs a C++ compiler, and {os.environ.get('CXX', 'g++')} is not installed; install it "
            f"(Debian: apt install g++), name another one in CXX, {remedy}"
        )
    if device.type != "cpu" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            f"{_KEY}=true needs the package triton on {device.type}; pip install 'moepp[triton]', {remedy}"
        )
    argument = torch.ones(8, device=device, requires_grad=True)
    try:
        torch.compile(_probe)(argument).sum().backward()
    except Exception as error:  # whatever the compiler behind it raises
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"{_KEY}=true, but torch.compile fails on {device.type}: {reason.strip()}; install a C++ compiler and "
            f"Python's headers (Debian: apt install g++ python3-dev), {remedy}"
        ) from error


def _probe(argument: torch.Tensor) -> torch.Tensor:
    return (argument.sin() + 1).square()

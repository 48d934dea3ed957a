"""The CPU kind: which instructions torch, oneDNN, MKL and the project's own kernels use on the CPU.

Unset, ``MOEPP_CPU`` leaves everything to the machine. Set to one of :data:`KINDS`, it makes the machine behave like a
lesser one, so that every kind can be tested on one that has them all. torch reads its variables once, so the package
imports this module before all else; processes started later inherit them.

Imports nothing heavy.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moepp.errors import ConfigError

VARIABLE = "MOEPP_CPU"
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Kind:
    """A set of instructions.

    Attributes:
        title: for people.
        needs: flags that the processor must have, as Linux names them.
        variables: what makes torch's own kernels, oneDNN and MKL keep to these instructions.
        compiler: the option that makes a C compiler do so; None: no compiled kernels.
        multiplies_bfloat16: whether oneDNN has products of bfloat16.
    """

    title: str
    needs: frozenset[str]
    variables: Mapping[str, str]
    compiler: tuple[str, ...] | None
    multiplies_bfloat16: bool


def _variables(aten: str, onednn: str, mkl: str) -> dict[str, str]:
    return {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_BF16 = _AVX512 | {"avx512_bf16"}
KINDS = {
    "amx": Kind(
        "AMX tile registers, bfloat16",
        _BF16 | {"amx_tile", "amx_bf16"},
        _variables("avx512", "AVX512_CORE_AMX", "AVX512"),
        ("-march=native",),  # no compiler option names these processors alone
        True,
    ),
    "avx512_bf16": Kind(
        "AVX-512 with bfloat16",
        _BF16,
        _variables("avx512", "AVX512_CORE_BF16", "AVX512"),
        ("-march=x86-64-v4", "-mavx512bf16"),
        True,
    ),
    "avx512": Kind(
        "AVX-512 without bfloat16",
        _AVX512,
        _variables("avx512", "AVX512_CORE", "AVX512"),
        ("-march=x86-64-v4",),
        True,  # emulated, by way of float32
    ),
    "avx2": Kind("AVX2", _AVX2, _variables("avx2", "AVX2", "AVX2"), ("-march=x86-64-v3",), False),
    "portable": Kind("no compiled kernels", frozenset(), _variables("default", "SSE41", "SSE4_2"), None, False),
}


@functools.cache
def flags() -> frozenset[str]:
    """Return the processor's features by Linux's names; empty if unknown."""
    lines = CPUINFO.read_text(errors="replace").splitlines() if CPUINFO.exists() else []
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())


def missing(name: str) -> list[str]:
    """Return the features of a kind that this processor lacks."""
    return sorted(KINDS[name].needs - flags())


def environment(name: str | None, base: Mapping[str, str]) -> dict[str, str]:
    """Return ``base`` for a new process of that kind, or of the machine's own (None)."""
    ours = {VARIABLE, *(variable for kind in KINDS.values() for variable in kind.variables)}
    return {key: value for key, value in base.items() if key not in ours} | ({VARIABLE: name} if name else {})


@functools.cache
def chosen() -> str | None:
    """Return the kind that ``MOEPP_CPU`` names, or None where it is unset.

    Raises:
        ConfigError: an unknown kind, one that this machine lacks, or one that this process cannot use.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    has = "this machine has " + ", ".join(kind for kind in KINDS if not missing(kind))
    if name not in KINDS:
        raise ConfigError(f"{VARIABLE}={name} is not one of {', '.join(KINDS)}; {has}")
    if lacks := missing(name):
        raise ConfigError(f"{VARIABLE}={name} needs a processor with {', '.join(lacks)}; {has}")
    for variable, value in KINDS[name].variables.items():
        found = os.environ.get(variable)
        if found is None and "torch" in sys.modules:
            raise ConfigError(f"{VARIABLE}={name} comes too late, torch is imported already; import moepp before torch")
        if found not in (None, value):
            raise ConfigError(f"{variable}={found} contradicts {VARIABLE}={name}, which sets it to {value}; unset it")
    return name


def _steer() -> None:
    try:
        name = chosen()
    except ConfigError:  # whoever uses the CPU asks again and reports it; an import that fails gives a traceback
        return
    if name is not None:
        os.environ.update(KINDS[name].variables)


_steer()

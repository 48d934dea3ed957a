"""Compiles the C files of this folder for this machine, once per element type, and loads them.

The result is kept in the user's cache folder (:mod:`moepp.ops.cpu.cache`) under a name made from everything it depends
on. Several processes may want it at once: one builds, the others wait for it.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moepp import cpu
from moepp.errors import ConfigError, WriteError
from moepp.ops.cpu.cache import Cache, CacheError, find_cache, open_library
from moepp.ops.cpu.compiler import BuildError, Compiler, find_compiler, run_compiler
from moepp.ops.signatures import SIGNATURES, TRITON_ONLY, check_arguments

logger = logging.getLogger("moepp")

_FOLDER = Path(__file__).parent
_SOURCES = ("moe.c", "routing.c", "project.c", "amx_experts.c", "avx2_experts.c", "transpose.c", "cross_entropy.c")
_HEADERS = ("vector.h", "tiles.h", "products.h")
ELEMENT_BITS = {torch.bfloat16: 16, torch.float32: 32}
FUNCTIONS = tuple(name for name in SIGNATURES if name not in TRITON_ONLY)
_CPU = torch.device("cpu")
_FLAGS = ("-O3", "-shared", "-fPIC", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-w")
# Where the innermost loops begin decides over some 3 percent of their time.
_NATIVE = ("-march=native", "-mprefer-vector-width=512", "-falign-loops=64")
_ROOM_BYTES = 4_000_000  # for what a compiler writes on the way
# Tried in this order: not every compiler knows these flags or has OpenMP.
_ATTEMPTS = ((*_NATIVE, "-fopenmp"), ("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())


@dataclass(frozen=True)
class Library:
    """The compiled kernels for one element type."""

    handle: ctypes.CDLL
    path: Path
    element: torch.dtype
    has_amx: bool  # whether amx_expert_forward and amx_expert_backward can be called
    has_avx2_experts: bool  # whether avx2_expert_forward and avx2_expert_backward can be called

    def call(self, name: str, *arguments: Tensor | int | None) -> None:
        """Run a kernel.

        Raises:
            TypeError: see :func:`moepp.ops.signatures.check_arguments`; no memory was touched.
        """
        check_arguments(name, arguments, self.element, _CPU)
        getattr(self.handle, name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


@functools.cache
def library(dtype: torch.dtype) -> Library | None:
    """Return the kernels for CPU tensors of ``dtype``; None if the build failed (warned once).

    Raises:
        ConfigError: ``MOEPP_CPU`` is wrong, or names tile registers that the system does not grant.
    """
    kind = cpu.chosen()
    if dtype not in ELEMENT_BITS or (kind is not None and cpu.KINDS[kind].compiler is None):
        return None
    try:
        kernels = _find_or_build(ELEMENT_BITS[dtype], _attempts(kind))
    except (BuildError, CacheError, OSError) as error:
        _warn_once(
            f"there are no compiled kernels for the CPU ({error}); torch operations take their place, with the same "
            "results but slower"
        )
        return None
    if kind == "amx" and dtype == torch.bfloat16 and not kernels.has_amx:
        raise ConfigError(f"{cpu.VARIABLE}={kind}, but the system or the compiler has no tile registers; unset it")
    return kernels


@functools.cache
def _warn_once(message: str) -> None:
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))  # bare srun sets the latter
    is_first = local_rank == "0"  # the others of a machine have the same to say
    logger.log(logging.WARNING if is_first else logging.INFO, "%s", message)


def _attempts(kind: str | None) -> tuple[tuple[str, ...], ...]:
    """Return the compiler options to try in turn, all limited to the requested kind's instructions."""
    option = None if kind is None else cpu.KINDS[kind].compiler
    if option is None or option == _NATIVE[:1]:
        return _ATTEMPTS
    return ((*option, *_NATIVE[1:], "-fopenmp"), (*option, "-fopenmp"), option)


def _find_or_build(bits: int, attempts: tuple[tuple[str, ...], ...]) -> Library:
    compiler, cache = find_compiler(), find_cache()
    key = _key(bits, attempts, compiler)
    name = f"kernels-{bits}-{key.hex()[:20]}.so"
    for is_last in (False, True):
        content = cache.read(name, key) or _build(bits, attempts, compiler, cache, name, key)
        try:
            return _load(content, cache.folder / name, bits)
        except (OSError, AttributeError) as error:  # not a library, of another machine, or without a function
            cache.remove(name)
            if is_last:
                raise BuildError(
                    f"{' '.join(compiler.command)} made a library that cannot be loaded: {error}"
                ) from error
    raise AssertionError


def _build(
    bits: int, attempts: tuple[tuple[str, ...], ...], compiler: Compiler, cache: Cache, name: str, key: bytes
) -> bytes:
    with cache.lock():
        if content := cache.read(name, key):
            return content  # built by another process meanwhile
        for remark in cache.remarks:
            _warn_once(f"compiled kernels are kept in {cache.folder}, because {remark}")
        if (free := cache.free_bytes()) < _ROOM_BYTES:
            raise BuildError(
                f"{os.strerror(errno.ENOSPC)} in {cache.folder}: {free:,} bytes; free some, or set XDG_CACHE_HOME to "
                "another folder"
            )
        with cache.scratch() as scratch:
            content = _compile(bits, attempts, compiler, scratch)
        try:
            cache.write(name, key, content)
        except WriteError as error:
            _warn_once(f"compiled kernels are used now but cannot be kept: {error}")
    return content


def _compile(bits: int, attempts: tuple[tuple[str, ...], ...], compiler: Compiler, scratch: Path) -> bytes:
    sources, result = [str(_FOLDER / name) for name in _SOURCES], scratch / "kernels.so"
    for number, flags in enumerate(attempts, start=1):
        openmp = ["-Wl,--as-needed", *_torch_openmp()] if "-fopenmp" in flags else []
        options = [*_FLAGS, *flags, f"-DELEMENT_BITS={bits}", *sources, *openmp, "-lm", "-o", str(result)]
        try:
            run_compiler(compiler, options, scratch)
        except BuildError as error:
            if number == len(attempts) or error.is_final:
                raise
        else:
            return result.read_bytes()
    raise AssertionError


def _load(content: bytes, path: Path, bits: int) -> Library:
    handle = open_library(content, path)
    for name in FUNCTIONS:
        function, kinds = getattr(handle, name), SIGNATURES[name].split()
        function.argtypes = [ctypes.c_int64 if kind == "n" else ctypes.c_void_p for kind in kinds]
        function.restype = None
    for answer in (handle.has_amx, handle.has_avx2_experts):
        answer.argtypes, answer.restype = [], ctypes.c_int64
    [element] = [dtype for dtype, size in ELEMENT_BITS.items() if size == bits]
    return Library(handle, path, element, bool(handle.has_amx()), bool(handle.has_avx2_experts()))


def _key(bits: int, attempts: tuple[tuple[str, ...], ...], compiler: Compiler) -> bytes:
    """Return the SHA-256 of all that the library depends on."""
    key = hashlib.sha256()
    texts = [(_FOLDER / name).read_bytes() for name in (*_SOURCES, *_HEADERS)]
    openmp = [Path(path).name for path in _torch_openmp()]
    settings = (bits, _FLAGS, attempts, compiler, platform.libc_ver(), torch.__version__, openmp, _processor())
    for part in (*texts, repr(settings).encode()):
        key.update(hashlib.sha256(part).digest())
    return key.digest()


def _torch_openmp() -> list[str]:
    """Return torch's own OpenMP runtime: the threads of a second one would fight for the cores."""
    return [str(path) for path in sorted(Path(torch.__file__).parent.glob("lib/lib*omp*.so*"))[:1]]


def _processor() -> str:
    """Return what -march=native depends on: home folders are shared by machines of several kinds."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.machine() + platform.processor()
    lines = cpuinfo.read_text(errors="replace").splitlines()
    return platform.machine() + "".join(
        next((line for line in lines if line.startswith(field)), "") for field in ("model name", "flags", "Features")
    )

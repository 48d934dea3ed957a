"""Compiles the C files of this folder for this machine, once per element type, and loads them.

The result is kept in the user's cache folder under a name made from everything it depends on. Several processes may
build at once: each writes a file of its own and renames it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent
_SOURCES = ("moe.c", "routing.c", "project.c", "experts.c", "vector_experts.c", "transpose.c", "cross_entropy.c")
_HEADERS = ("vector.h", "tiles.h", "products.h")
ELEMENT_BITS = {torch.bfloat16: 16, torch.float32: 32}

# Arguments of each kernel: t tensor (None: null), n number.
_SIGNATURES = {
    "swiglu": "tntntnnn",
    "swiglu_backward": "ttttnn",
    "transpose": "tntnnn",
    "combine": "tttttttt" + "nnnn",
    "combine_backward": "tttttttttttttt" + "nnnn",
    "project": "tttnnn",
    "project_backward": "ttttttnnn",
    "gates": "ttttnnnnn",
    "gates_backward": "ttttttnnnnn",
    "affine": "tttttnnnnn",
    "affine_backward": "tttttttnnnnn",
    "count_experts": "ttnn",
    "sort_slots": "ttttnn",
    "cross_entropy": "tttnnnn",
    "expert_forward": "tttttnnn",
    "expert_backward": "tttttttnnnnn",
    "vector_expert_forward": "tttttt" + "nnnn",
    "vector_expert_backward": "ttttttttttt" + "nnn",
}
_FLAGS = ("-O3", "-shared", "-fPIC", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-w")
# Where the innermost loops begin decides over some 3 percent of their time.
_NATIVE = ("-march=native", "-mprefer-vector-width=512", "-falign-loops=64")
# Tried in this order: not every compiler knows these flags or has OpenMP.
_ATTEMPTS = ((*_NATIVE, "-fopenmp"), ("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())


@dataclass(frozen=True)
class Library:
    """The compiled kernels for one element type."""

    handle: ctypes.CDLL
    path: Path
    has_tiles: bool  # whether expert_forward and expert_backward can be called
    has_vector_experts: bool  # whether those of that name can

    def call(self, name: str, *arguments: Tensor | int | None) -> None:
        """Run a kernel; tensors must be dense (rows may lie apart only where the kernel takes a stride)."""
        getattr(self.handle, name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


class BuildError(Exception):
    """Why there are no compiled kernels, in one line."""


@functools.cache
def library(dtype: torch.dtype) -> Library | None:
    """The kernels for CPU tensors of ``dtype``; None where they cannot be had, which is said once."""
    if dtype not in ELEMENT_BITS:
        return None
    try:
        return _load(_compiled(ELEMENT_BITS[dtype]))
    except (BuildError, OSError) as error:
        logging.getLogger("moepp").warning(
            "kernels for the CPU could not be built (%s); torch operations take their place, with the same "
            "results but slower",
            error,
        )
        return None


def _load(path: Path) -> Library:
    handle = ctypes.CDLL(str(path))
    kinds: dict[str, Any] = {"t": ctypes.c_void_p, "n": ctypes.c_int64}
    for name, signature in _SIGNATURES.items():
        function = getattr(handle, name)
        function.argtypes, function.restype = [kinds[kind] for kind in signature], None
    for answer in (handle.has_tiles, handle.has_vector_experts):
        answer.argtypes, answer.restype = [], ctypes.c_int64
    return Library(handle, path, bool(handle.has_tiles()), bool(handle.has_vector_experts()))


def _compiled(bits: int) -> Path:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise BuildError("no C compiler found; install gcc or clang")
    key = hashlib.sha256()
    texts = [(_FOLDER / name).read_bytes() for name in (*_SOURCES, *_HEADERS)]
    for part in (
        *texts,
        repr((_FLAGS, _ATTEMPTS)).encode(),
        compiler.encode(),
        torch.__version__.encode(),
        _processor().encode(),
    ):
        key.update(part)
    folder = _cache_folder()
    target = folder / f"kernels-{bits}-{key.hexdigest()[:20]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
        result = Path(scratch, "kernels.so")
        _compile(compiler.split(), bits, result)
        os.replace(result, target)
    return target


def _compile(compiler: list[str], bits: int, result: Path) -> None:
    problem, sources = "", [str(_FOLDER / name) for name in _SOURCES]
    for flags in _ATTEMPTS:
        openmp = _torch_openmp() if "-fopenmp" in flags else []
        command = [*compiler, *_FLAGS, *flags, f"-DELEMENT_BITS={bits}", *sources, *openmp, "-lm", "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return
        problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
    raise BuildError(f"{compiler[0]}: {problem}")


def _torch_openmp() -> list[str]:
    """torch's own OpenMP runtime: with a second one the threads of the two would fight for the cores."""
    found = sorted(Path(torch.__file__).parent.glob("lib/lib*omp*.so*"))
    return ["-Wl,--as-needed", str(found[0])] if found else []


def _processor() -> str:
    """What -march=native depends on; shared home folders serve machines of several kinds."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.machine() + platform.processor()
    lines = cpuinfo.read_text(errors="replace").splitlines()
    return platform.machine() + "".join(
        next((line for line in lines if line.startswith(field)), "") for field in ("model name", "flags", "Features")
    )


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for folder in (Path(root, "moepp"), Path(tempfile.gettempdir(), f"moepp-{os.getuid()}")):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise BuildError(f"neither {root} nor {tempfile.gettempdir()} is writable")

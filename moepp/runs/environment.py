"""What a run's results may depend on besides its configuration; never the process environment."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moepp import cpu

_PACKAGES = (
    "moepp",
    "torch",
    "deepspeed",
    "megatron-core",
    "numpy",
    "wandb",
    "hydra-core",
    "tokenizers",
    "transformers",
    "pyarrow",
    "triton",
)


# Those that decide what a step computes; the ranks of a run must have the same.
_COMPUTING = ("torch", "deepspeed", "megatron-core", "numpy", "triton")
_SOURCES = (".py", ".c", ".h")


def code_facts() -> dict[str, str]:
    """Return what all ranks must have in common besides the configuration: packages, and our own files."""
    packages = {name: _version(name) or "absent" for name in _COMPUTING}
    return {"Python": platform.python_version(), **packages, "moepp's source": source_digest()}


def command_facts(plugins: Sequence[str] = ()) -> dict[str, str]:
    """Return what all ranks of a command must have in common: packages, plugins and the command line."""
    return {"the command": shlex.join(sys.argv[1:]), **code_facts(), **plugin_facts(plugins)}


def plugin_facts(plugins: Sequence[str]) -> dict[str, str]:
    """Return a digest of the source of each plugin, which was imported already.

    It covers what was imported of its package, or of the folder in which a plugin without a package lies.
    """
    return {f"the source of plugin {name}": f"(digest {_plugin_digest(name)})" for name in plugins}


def _plugin_digest(name: str) -> str:
    top = name.partition(".")[0]
    own = getattr(sys.modules.get(name), "__file__", None)
    digest = hashlib.blake2b(digest_size=6)
    for module_name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        in_package = module_name == top or module_name.startswith(f"{top}.")
        is_beside = own is not None and file is not None and os.path.dirname(own) == os.path.dirname(file)
        if (in_package or is_beside) and file is not None and module_name != "__main__" and os.path.isfile(file):
            content = Path(file).read_bytes()
            digest.update(f"{module_name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


@functools.cache
def source_digest(folder: Path | None = None) -> str:
    """12 hexadecimal digits for names and contents of a package's source files; of this one by default."""
    folder = folder or Path(__file__).resolve().parents[1]
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def describe_environment(device_name: str, world_size: int) -> dict[str, Any]:
    """Return the versions, commit and hardware for environment.json.

    Args:
        device_name: of rank 0's device, for example ``torch.cuda.get_device_name()`` or "cpu".
        world_size: ranks of the run.
    """
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "git": _git(Path(__file__).resolve().parents[2]),
        "device": device_name,
        "cpu": cpu_name(),
        "cpu_kind": cpu.chosen(),  # None: the machine's own
        "cpu_count": os.cpu_count(),
        "hostname": socket.gethostname(),
        "world_size": world_size,
    }


def version_line() -> str:
    """Return the versions of this package, torch and Python, read without importing torch."""
    python = platform.python_version()
    return (
        f"moepp {_version('moepp') or 'not installed'} (torch {_version('torch') or 'not installed'}, Python {python})"
    )


def cpu_name() -> str:
    """Return the processor's name, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path) -> dict[str, Any] | None:
    """Commit of the checkout that the code runs from; None if it is installed, or there is no git."""
    top = _run_git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:  # some other repository around the installed package
        return None
    commit = _run_git(root, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_run_git(root, "status", "--porcelain", "--untracked-files=no"))}


def _run_git(root: Path, *args: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None

"""Which device a rank computes on: one answer for training and for every command.

A GPU that torch cannot use is an error: a run that took the CPU instead would be a hundred times slower without a word.
It is the user who decides otherwise, with ``runtime.device=cpu`` (commands: ``--device cpu``) or by hiding the GPUs
(``CUDA_VISIBLE_DEVICES=``).
"""

from __future__ import annotations

import glob
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from moepp.distributed.agreement import name_ranks
from moepp.errors import ConfigError, PeerError

KEY, OPTION = "runtime.device=", "--device "  # how a user names a device: in a configuration, in a command line
HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
# Oldest NVIDIA driver for each major version of CUDA: "CUDA Compatibility", NVIDIA's manual, table of minor versions.
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
_NO_FLOAT64 = ("mps",)  # sums over ranks and steps need it


def pick_device(
    local_rank: int, wanted: str = "auto", local_size: int | None = None, shared: bool = False, named: str = KEY
) -> torch.device:
    """Return this rank's device, which is made the current one.

    A process that sees one device takes it, whatever its LOCAL_RANK: launchers may show each process its own.

    Args:
        local_rank: of this process among those of its host.
        wanted: "auto" (the accelerator where there is one, else the CPU) or a kind of device.
        local_size: processes of this host, where the launcher tells.
        shared: whether several ranks may have the same device.
        named: how the user names a device, for messages.

    Raises:
        ConfigError: there is no such device, torch cannot use the one that is there, or there are too few.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and wanted == "auto" and accelerator.type in _NO_FLOAT64:
        return torch.device("cpu")
    if accelerator is None:
        if problem := _why_no_accelerator(wanted, named):
            raise ConfigError(problem)
        return torch.device("cpu")
    if wanted not in ("auto", accelerator.type):
        raise ConfigError(
            f"{named}{wanted}, but torch {torch.__version__} offers {accelerator.type} here; set "
            f"{named}{accelerator.type} or {named}cpu"
        )
    index = _index(local_rank, local_size, accelerator.type, shared)
    torch.accelerator.set_device_index(index)
    return torch.device(accelerator.type, index)


def use_in_thread(device: torch.device) -> None:
    """Make ``device`` the current one of the calling thread: a new thread starts with the first of the host."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)


def lock_pages(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host in memory from which ``device`` can copy while the host goes on.

    A copy from other memory makes the host wait until it is done, whatever ``non_blocking`` says. torch keeps such
    memory for the next tensor of its size, and gives it away no sooner than copies from it have ended.
    """
    return tensor if device.type == "cpu" or tensor.is_pinned() else tensor.pin_memory()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on ``device``; the host does not wait for the copy."""
    return lock_pages(tensor, device).to(device, non_blocking=True)


def are_hidden(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the user has hidden all GPUs: the first entry of a list of visible ones is none."""
    firsts = [environ[name].split(",")[0].strip() for name in HIDING if name in environ]
    return any(not first or first.startswith(("-", "NoDev")) for first in firsts)


def require_own_devices(store: Store, rank: int, world_size: int, device: torch.device, seconds: float) -> None:
    """Refuse ranks that were given the same device; collective, over the store.

    NCCL would refuse them with an error of its own, on some ranks only.

    Raises:
        ConfigError: names the ranks, the same on every rank.
        PeerError: a rank did not answer in time.
    """
    if device.type == "cpu" or world_size == 1:
        return
    properties = torch.get_device_module(device).get_device_properties(device)
    name = f"{socket.gethostname()} {getattr(properties, 'uuid', f'of rank {rank}')}"
    try:
        store.set(f"device/{rank}", name)
        store.add("device/named", 1)
        if rank == 0:
            store.set("device/verdict", _shared_devices(store, world_size))
        problem = store.get("device/verdict").decode()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise PeerError(
            f"a rank did not name its device within {seconds:g} s ({reason}); look for its error"
        ) from error
    if problem:
        raise ConfigError(problem)


def _shared_devices(store: Store, world_size: int) -> str:
    """Say on rank 0 which ranks have a device in common; nothing where none have."""
    ranks: dict[str, list[int]] = {}
    for rank in range(world_size):
        ranks.setdefault(store.get(f"device/{rank}").decode(), []).append(rank)  # waits for it
    shared = {name: of for name, of in ranks.items() if len(of) > 1}
    if not shared:
        return ""
    told = "; ".join(f"{name_ranks(of)} have one device in common ({name})" for name, of in list(shared.items())[:4])
    return (
        f"{told}; start one process per device, or give each its own (CUDA_VISIBLE_DEVICES, --gpus-per-task); "
        "runtime.backend=gloo lets them share"
    )


def _index(local_rank: int, local_size: int | None, kind: str, shared: bool) -> int:
    count = torch.accelerator.device_count()
    if shared:
        return local_rank % count
    if count == 1:
        return 0
    if max(local_rank + 1, local_size or 0) > count:
        processes = f"{local_size} processes" if local_size else f"a process with LOCAL_RANK={local_rank}"
        raise ConfigError(
            f"{processes} on a host that offers {count} devices of type {kind}; start at most {count} there (NPROC, "
            "--nproc_per_node, --ntasks-per-node), or make more devices visible"
        )
    return local_rank


def _why_no_accelerator(wanted: str, named: str) -> str | None:
    """Return why there is none though one was meant; None where the CPU is what the user expects."""
    if wanted == "auto" and are_hidden():
        return None
    remedy = f"or set {named}cpu to compute on the CPU"
    torch_name = f"torch {torch.__version__}"
    if wanted != "auto" and are_hidden():
        hiding = next(f"{name}={os.environ[name]}" for name in HIDING if name in os.environ)
        return f"{named}{wanted}, but {hiding} hides all GPUs; unset it, {remedy}"
    if torch.version.cuda is not None:
        return f"{torch_name} is built for CUDA {torch.version.cuda} but {_cuda_problem()}, {remedy}"
    for name, version in (("ROCm", torch.version.hip), ("XPU", getattr(torch.version, "xpu", None))):
        if version is not None:
            return (
                f"{torch_name} is built for {name} {version} but finds no GPU that it can use; check the driver and "
                f"that this host or container has the GPU, {remedy}"
            )
    if found := find_gpu():
        return (
            f"this host has a GPU ({found}) but {torch_name} is built for the CPU alone; install a build for the GPU "
            f"(MOEPP_TORCH=cuda ./launch/setup.sh), {remedy}"
        )
    if wanted != "auto":
        return f"{named}{wanted}, but this host has no GPU for {torch_name}; start where there is one, {remedy}"
    return None


def _cuda_problem() -> str:
    assert torch.version.cuda is not None
    driver, oldest = _driver_version(), _OLDEST_DRIVER.get(int(torch.version.cuda.partition(".")[0]), 0)
    if driver is None and find_gpu() is None:
        return (
            "finds neither a GPU nor an NVIDIA driver; start where there is one (docker run --gpus all, sbatch "
            "--gpus-per-node), install the CPU build (MOEPP_TORCH=cpu ./launch/setup.sh)"
        )
    if driver is not None and int(driver.partition(".")[0]) < oldest:
        return (
            f"the NVIDIA driver {driver} is too old for it; install driver {oldest} or newer, or a torch for an older "
            "CUDA"
        )
    return (
        f"cannot use the GPU here (NVIDIA driver {driver or 'not loaded'}: {_what_torch_says()}); check that "
        "nvidia-smi lists it"
    )


def _what_torch_says() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:160]
    return "no reason given"


def find_gpu(root: Path = Path("/")) -> str | None:
    """Return what shows that a GPU is in this host, whatever torch thinks of it; None: nothing does."""
    nvidia = sorted(glob.glob(str(root / "dev/nvidia[0-9]*")))
    if nvidia:
        return f"/dev/{Path(nvidia[0]).name}"
    for path in sorted(glob.glob(str(root / "sys/class/kfd/kfd/topology/nodes/*/properties"))):
        try:
            facts = dict(line.split()[:2] for line in Path(path).read_text().splitlines() if len(line.split()) > 1)
        except OSError:
            continue
        if facts.get("simd_count", "0") != "0" and facts.get("cpu_cores_count", "0") == "0":  # no processor's own GPU
            return "/dev/kfd"
    return None


def _driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """For example "535.104.05"; None where no driver is loaded."""
    try:
        match = re.search(r"\b(\d{3}\.[\d.]*\d)\b", path.read_text())
    except OSError:
        return None
    return match[1] if match else None

"""Which device a rank takes, and what it says where torch cannot use the GPU. The devices are imitations."""

from __future__ import annotations

import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from moepp.distributed import device as devices
from moepp.distributed.device import HIDING, find_gpu, pick_device, require_own_devices, use_in_thread
from moepp.errors import ConfigError, MoeppError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch):
    """Imitates a host: ``host(count=8)`` has eight GPUs that work; returns the indices that were made current."""
    for name in HIDING:
        monkeypatch.delenv(name, raising=False)
    chosen: list[int] = []

    def imitate(
        count: int = 0,
        kind: str = "cuda",
        cuda: str | None = None,
        hip: str | None = None,
        driver: str | None = None,
        gpu: str | None = None,
    ) -> list[int]:
        current = torch.device(kind) if count else None
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: current)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(devices, "_driver_version", lambda: driver)
        monkeypatch.setattr(devices, "find_gpu", lambda: gpu)
        return chosen

    return imitate


def refusal(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        pick_device(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and not caught.value.said_here  # one line, said by the first rank alone
    return message


def test_a_host_without_a_gpu_trains_on_the_cpu(host):
    host()
    assert pick_device(0) == pick_device(3, "auto", 4) == torch.device("cpu")


def test_each_rank_takes_its_own_gpu_and_makes_it_current(host):
    chosen = host(count=4, cuda="13.0")
    assert [pick_device(rank, "auto", 4) for rank in range(4)] == [torch.device("cuda", rank) for rank in range(4)]
    assert pick_device(2, "cuda", 4) == torch.device("cuda", 2)
    assert chosen == [0, 1, 2, 3, 2]


def test_the_only_visible_gpu_is_taken_whatever_the_local_rank(host):
    chosen = host(count=1, cuda="13.0")
    assert pick_device(5, "auto", 8) == torch.device("cuda", 0)
    assert chosen == [0]


def test_the_cpu_is_taken_on_request_wherever(host):
    chosen = host(count=4, cuda="13.0")
    assert pick_device(9, "cpu", 16) == torch.device("cpu")
    host(cuda="13.0", driver="470.1", gpu="/dev/nvidia0")
    assert pick_device(0, "cpu") == torch.device("cpu")
    assert chosen == []


@pytest.mark.parametrize("rank", [0, 7, 8, 15])
def test_too_many_processes_are_one_message_on_every_rank(host, rank):
    host(count=8, cuda="13.0")
    assert refusal(rank, "auto", 16).startswith(
        "16 processes on a host that offers 8 devices of type cuda; start at mo"
    )


def test_too_many_processes_where_the_launcher_does_not_count_them(host):
    host(count=2, cuda="13.0")
    assert pick_device(1) == torch.device("cuda", 1)
    assert "LOCAL_RANK=2 on a host that offers 2 devices" in refusal(2)


def test_processes_share_devices_on_request(host):
    host(count=2, cuda="13.0")
    assert [pick_device(rank, "auto", 5, shared=True).index for rank in range(5)] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("facts", "parts"),
    [
        ({"cuda": "13.0", "driver": "535.104.05", "gpu": "/dev/nvidia0"}, ["driver 535.104.05 is too old", "580"]),
        ({"cuda": "12.8", "driver": "470.82.01", "gpu": "/dev/nvidia0"}, ["driver 470.82.01 is too old", "525"]),
        ({"cuda": "12.8", "driver": "535.104.05", "gpu": "/dev/nvidia0"}, ["cannot use the GPU here", "535.104.05"]),
        ({"cuda": "13.0", "gpu": "/dev/nvidia0"}, ["NVIDIA driver not loaded", "nvidia-smi"]),
        ({"cuda": "13.0"}, ["neither a GPU nor an NVIDIA driver", "--gpus all", "MOEPP_TORCH=cpu"]),
        ({"hip": "7.1"}, ["built for ROCm 7.1", "finds no GPU"]),
        ({"gpu": "/dev/nvidia0"}, ["has a GPU (/dev/nvidia0)", "for the CPU alone", "MOEPP_TORCH=cuda"]),
        ({"gpu": "/dev/kfd"}, ["has a GPU (/dev/kfd)"]),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_an_error(host, wanted, facts, parts):
    host(**facts)
    message = refusal(0, wanted)
    assert all(part in message for part in (*parts, torch.__version__, "set runtime.device=cpu")), message


@pytest.mark.parametrize("name", HIDING)
@pytest.mark.parametrize(
    ("value", "hidden"),
    [("", True), ("-1", True), ("NoDevFiles", True), ("-1,0", True), ("0", False), ("GPU-1", False)],
)
def test_hidden_gpus_mean_the_cpu(host, monkeypatch, name, value, hidden):
    host(cuda="13.0", driver="470.1", gpu="/dev/nvidia0")
    monkeypatch.setenv(name, value)
    if hidden:
        assert pick_device(0) == torch.device("cpu")
        assert f"{name}={value} hides all GPUs" in refusal(0, "cuda")
    else:
        assert "too old" in refusal(0)


def test_a_device_that_is_not_there_is_an_error_named_as_the_user_named_it(host):
    host()
    assert refusal(0, "cuda").startswith("runtime.device=cuda, but this host has no GPU")
    assert refusal(0, "xpu", named="--device ").startswith("--device xpu, but this host has no GPU")
    host(count=1)
    assert "--device xpu, but torch" in (message := refusal(0, "xpu", named="--device "))
    assert "set --device cuda or --device cpu" in message


def test_a_device_without_float64_is_left_aside(host):
    host(count=1, kind="mps")
    assert pick_device(0) == torch.device("cpu")


def test_threads_start_with_their_ranks_device(host):
    chosen = host(count=8)
    use_in_thread(torch.device("cuda", 5))
    use_in_thread(torch.device("cpu"))
    assert chosen == [5]


def test_what_shows_that_a_gpu_is_there(tmp_path):
    assert find_gpu(tmp_path) is None
    nodes = tmp_path / "sys/class/kfd/kfd/topology/nodes"
    for node, cores, simd in ((0, 64, 0), (1, 8, 40)):  # a processor, and one with graphics of its own
        (nodes / str(node)).mkdir(parents=True)
        (nodes / str(node) / "properties").write_text(f"cpu_cores_count {cores}\nsimd_count {simd}\n")
    assert find_gpu(tmp_path) is None
    (nodes / "2").mkdir()
    (nodes / "2/properties").write_text("cpu_cores_count 0\nsimd_count 1216\n")
    assert find_gpu(tmp_path) == "/dev/kfd"
    (tmp_path / "dev").mkdir()
    for name in ("nvidiactl", "nvidia-uvm", "nvidia3"):
        (tmp_path / "dev" / name).touch()
    assert find_gpu(tmp_path) == "/dev/nvidia3"


def test_the_drivers_version_is_read_where_the_kernel_tells_it(tmp_path):
    path = tmp_path / "version"
    assert devices._driver_version(path) is None
    path.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
        "GCC version:  gcc version 11.4.0\n"
    )
    assert devices._driver_version(path) == "535.104.05"
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert devices._driver_version(path) == "580.65.06"


# --- two ranks with one device


def verdicts(monkeypatch: pytest.MonkeyPatch, uuids: list[str]) -> list[str]:
    """What each rank of one host hears; ``uuids`` of the ranks' devices."""
    by_index = [SimpleNamespace(uuid=uuid) for uuid in uuids]
    module = SimpleNamespace(get_device_properties=lambda device: by_index[device.index])
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    store, heard = HashStore(), [""] * len(uuids)
    store.set_timeout(timedelta(seconds=20))

    def ask(rank: int) -> None:
        try:
            require_own_devices(store, rank, len(uuids), torch.device("cuda", rank), 20)
        except MoeppError as error:
            heard[rank] = str(error)

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(len(uuids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return heard


def test_ranks_with_devices_of_their_own_go_on(monkeypatch):
    assert verdicts(monkeypatch, ["a", "b", "c"]) == ["", "", ""]


def test_every_rank_hears_which_ranks_have_one_device(monkeypatch):
    heard = verdicts(monkeypatch, ["a", "b", "a", "c", "a"])
    assert len(set(heard)) == 1
    assert heard[0].startswith("ranks 0, 2, 4 have one device in common (") and "runtime.backend=gloo" in heard[0]


# --- a CUDA build of torch where no GPU is


SIMULATED = (
    "import torch; torch.version.cuda = '13.0'; torch._C._accelerator_getAccelerator = lambda: torch.device('cuda'); "
)


def test_training_ends_with_one_line_before_anything_starts(tmp_path):
    """A CUDA build without a driver, as the whole program sees it."""
    run = f"{SIMULATED}\nfrom moepp.training.main import main; main(['run.dir={tmp_path}/run', 'data.paths=[nowhere]'])"
    ended = subprocess.run(
        [sys.executable, "-c", run],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("error: torch ") and "built for CUDA 13.0" in line and "runtime.device=cpu" in line
    assert not (tmp_path / "run").exists()

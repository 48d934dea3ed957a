"""The CPU kind that MOEPP_CPU names: what this process and its kernels keep to, and what is refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moepp import MoEConfig, MoELayer, cpu, ops
from moepp.cpu import KINDS, VARIABLE
from moepp.errors import ConfigError
from moepp.ops.backend import cpu_kernels
from tests.dist import WorkerPool

ROOT = Path(__file__).resolve().parents[3]
ATEN = {"amx": "AVX512", "avx512_bf16": "AVX512", "avx512": "AVX512", "avx2": "AVX2", "portable": "DEFAULT"}
EXPERTS = {  # in bfloat16 and float32
    "amx": ("amx", "loop"),
    "avx512_bf16": ("loop", "loop"),
    "avx512": ("loop", "loop"),
    "avx2": ("avx2", "avx2"),
    "portable": ("loop", "loop"),
}
of_a_kind = pytest.mark.skipif(cpu.chosen() is None, reason=f"{VARIABLE} names no kind")


def state(_: int = 0) -> tuple[str | None, str, bool, str, str]:
    """Kind, torch's own kernels, whether bfloat16 is converted, what experts are computed by."""
    device = torch.device("cpu")
    experts = [ops.expert_products(device, dtype, 64, 64).way for dtype in (torch.bfloat16, torch.float32)]
    converts = ops.multiplies_in_float32(torch.empty(0, dtype=torch.bfloat16))
    return cpu.chosen(), torch.backends.cpu.get_cpu_capability(), converts, *experts


# ---- of this process, whatever its kind: tests/unit/ops/test_cpu_kinds.py runs these for every kind ----


@of_a_kind
def test_this_process_keeps_to_its_kind():
    kind = cpu.chosen()
    assert kind is not None
    assert state() == (kind, ATEN[kind], kind in ("avx2", "portable"), *EXPERTS[kind])
    compiled = ops.describe(torch.device("cpu"), torch.float32)
    assert compiled == ("torch" if kind == "portable" else "compiled")


@of_a_kind
def test_worker_processes_are_of_the_same_kind(pool_1: WorkerPool):
    assert pool_1.run(state) == [state()]


@of_a_kind
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_hold_no_instruction_beyond_the_kind(dtype):
    library, kind = cpu_kernels(torch.empty(0, dtype=dtype)), cpu.chosen()
    if library is None:
        assert kind == "portable"
        return
    command = ["objdump", "-d", "--no-show-raw-insn", str(library.path)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    is_bf16 = dtype == torch.bfloat16
    assert ("%ymm" in code) and ("%zmm" in code or "%k1" in code) == (kind != "avx2")
    assert bool(re.search(r"vcvtneps2bf16|vcvtne2ps2bf16", code)) == (kind in ("amx", "avx512_bf16") and is_bf16)
    assert ("tdpbf16ps" in code) == (kind == "amx" and is_bf16)


@of_a_kind
def test_onednn_keeps_to_the_kind():
    probe = "import moepp, torch; torch.ones(64, 64).to_mkldnn().to_dense()"
    environment = os.environ | {"ONEDNN_VERBOSE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment, check=True)
    found, kind = next(line for line in done.stdout.splitlines() if "info,cpu,isa:" in line), cpu.chosen()
    assert kind is not None
    assert (kind == "portable") == ("SSE4" in found) and (kind == "avx2") == ("AVX2" in found)
    assert ("AVX-512" in found or "AMX" in found) == ATEN[kind].startswith("AVX512")
    assert ("AMX" in found) == (kind == "amx") and ("bfloat16" in found) == (kind in ("amx", "avx512_bf16"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_agrees_with_float64(dtype):
    torch.manual_seed(0)
    layer, x = MoELayer(MoEConfig(4, 64, 1, 1, 2, capacity_factor=None), 32).to(dtype), torch.randn(70, 32).to(dtype)
    wide = MoELayer(MoEConfig(4, 64, 1, 1, 2, capacity_factor=None), 32).double()
    wide.load_state_dict(layer.state_dict())
    grads = []
    for each, inputs in ((layer, x), (wide, x.double())):
        leaf = inputs.clone().requires_grad_()
        out = each(leaf)
        (out.hidden.double().square().sum() + out.aux_loss.double()).backward()
        grads.append([out.hidden, leaf.grad, *(p.grad for p in each.parameters())])
    for ours, wanted in zip(*grads, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        assert (ours.double() - wanted).norm() <= tolerance * wanted.norm() + 1e-12


# ---- what is refused ----


def choose(monkeypatch: pytest.MonkeyPatch, name: str, **variables: str) -> str | None:
    for variable in KINDS["avx2"].variables:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in ({VARIABLE: name} | variables).items():
        monkeypatch.setenv(variable, value)
    return cpu.chosen.__wrapped__()


@pytest.fixture
def flags(monkeypatch, tmp_path):
    """Sets what the processor can do."""

    def set_flags(*names: str) -> None:
        (tmp_path / "cpuinfo").write_text("model name\t: x\nflags\t\t: fpu " + " ".join(sorted(names)) + "\n")
        cpu.flags.cache_clear()

    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    yield set_flags
    cpu.flags.cache_clear()


@pytest.mark.parametrize("name", ["AVX2", "sse", "avx2 ", "none"])
def test_an_unknown_kind_is_refused_and_the_kinds_are_named(monkeypatch, flags, name):
    flags(*KINDS["avx512"].needs)
    with pytest.raises(ConfigError, match=f"^MOEPP_CPU={name} is not one of amx, .* has avx512, avx2, portable$"):
        choose(monkeypatch, name)


def test_a_kind_that_the_machine_lacks_is_refused_and_what_it_has_is_named(monkeypatch, flags):
    flags(*KINDS["avx2"].needs)
    with pytest.raises(ConfigError, match=r"MOEPP_CPU=avx512 needs .* avx512bw, .*; this machine has avx2, portable$"):
        choose(monkeypatch, "avx512")
    flags()  # another architecture, or a system without /proc/cpuinfo
    with pytest.raises(ConfigError, match=r"this machine has portable$"):
        choose(monkeypatch, "avx2")


def test_a_variable_that_says_otherwise_is_refused(monkeypatch, flags):
    flags(*KINDS["amx"].needs)
    with pytest.raises(ConfigError, match=r"ATEN_CPU_CAPABILITY=avx512 contradicts MOEPP_CPU=avx2, .* avx2; unset it"):
        choose(monkeypatch, "avx2", ATEN_CPU_CAPABILITY="avx512")
    assert choose(monkeypatch, "avx2", **KINDS["avx2"].variables) == "avx2"


def test_a_kind_that_comes_after_torch_is_refused(monkeypatch, flags):
    flags(*KINDS["amx"].needs)
    with pytest.raises(ConfigError, match="MOEPP_CPU=avx2 comes too late, torch is imported already; import moepp"):
        choose(monkeypatch, "avx2")


def test_without_the_variable_nothing_is_changed(monkeypatch):
    assert choose(monkeypatch, "") is None
    assert cpu.environment("avx2", {"ATEN_CPU_CAPABILITY": "avx512", "A": "b"}) == {"A": "b", VARIABLE: "avx2"}
    assert cpu.environment(None, {VARIABLE: "amx", "A": "b"}) == {"A": "b"}


@pytest.mark.parametrize(
    "command", [["train.py", "train.steps=1"], ["-m", "moepp.cli.main", "report", "x"]], ids=" ".join
)
def test_a_wrong_kind_ends_a_command_with_one_line(command):
    environment = cpu.environment("avx3", os.environ) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: MOEPP_CPU=avx3 is not one of") and done.stderr.count("\n") == 1

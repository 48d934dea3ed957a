"""A CUDA build of torch where no driver is (a login node, an image being built) imports everything and finds all tests.

There, `current_accelerator()` names a device that is not there, and most calls of torch.cuda raise.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = ("moepp", "data_tools", "launch", "tests")
FILES = [*sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")), ROOT / "train.py"]
HARMLESS = {"is_available", "device_count", "current_accelerator"}  # answer without a driver
THREADS = {  # what each thread of moepp is for: none that touches a device's tensors may forget whose device it is
    "moepp/bench/processes.py": "watches the parent process",
    "moepp/checkpoint/saver.py": "use_in_thread",
    "moepp/data/prepare/encode.py": "watches the parent process",
    "moepp/data/prepare/mixed.py": "fetches packages",
    "moepp/data/reader.py": "use_in_thread",
    "moepp/distributed/meeting.py": "connects to the store",
    "moepp/distributed/peers.py": "asks the store",
    "moepp/distributed/session.py": "use_in_thread",
    "moepp/metrics/wandb.py": "hands over numbers",
    "moepp/training/job.py": "watches the parent process",
}


def problems(source: str) -> Iterator[str]:
    """Unchecked questions for an accelerator anywhere, and calls at import that need one."""
    tree = ast.parse(source)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if ast.unparse(call.func).endswith("current_accelerator"):
            checked = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "check_available")]
            if not any(isinstance(value, ast.Constant) and value.value is True for value in checked):
                yield f"line {call.lineno}: current_accelerator() without check_available=True"
    for call in _calls_at_import(tree):
        name = ast.unparse(call.func)
        of_device = name.startswith(("torch.cuda.", "torch.accelerator.", "torch.xpu.")) or name.endswith(".cuda")
        if of_device and name.rpartition(".")[2] not in HARMLESS:
            yield f"line {call.lineno}: {name}() at import"


def _calls_at_import(node: ast.AST) -> Iterator[ast.Call]:
    """Calls outside the bodies of functions; decorators and defaults of arguments are inside."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield child
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            now = [*getattr(child, "decorator_list", ()), *child.args.defaults, *filter(None, child.args.kw_defaults)]
            for part in now:
                yield from [part] if isinstance(part, ast.Call) else []
                yield from _calls_at_import(part)
        else:
            yield from _calls_at_import(child)


def test_no_file_asks_for_an_accelerator_unchecked():
    found = {str(path.relative_to(ROOT)): list(problems(path.read_text())) for path in FILES}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("def f():\n    return torch.accelerator.current_accelerator()", "line 2: current_accelerator() without"),
        ("current_accelerator(check_available=False)", "without check_available"),
        ("DEVICE = torch.cuda.current_device()", "torch.cuda.current_device() at import"),
        ("def f(x=torch.cuda.get_device_name()): pass", "get_device_name() at import"),
        ("@mark(torch.cuda.get_device_capability() > (8, 0))\ndef f(): pass", "get_device_capability() at import"),
        ("class A:\n    x = torch.zeros(3).cuda()", "at import"),
        ("if True:\n    torch.accelerator.set_device_index(0)", "set_device_index() at import"),
    ],
)
def test_unchecked_calls_are_found(source, part):
    (found,) = problems(source)
    assert part in found


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    return torch.cuda.current_device()",
        "GPU = torch.cuda.is_available()",
        "A = torch.accelerator.current_accelerator(check_available=True)",
        "A = torch.accelerator.current_accelerator(True)",
        "f = lambda: torch.cuda.current_device()",
    ],
)
def test_checked_calls_pass(source):
    assert list(problems(source)) == []


def test_every_thread_that_touches_tensors_takes_its_ranks_device():
    starting = {
        str(path.relative_to(ROOT)): path.read_text()
        for path in FILES
        if path.is_relative_to(ROOT / "moepp")
        and any(start in path.read_text() for start in ("Thread(", "ThreadPoolExecutor("))
    }
    assert starting.keys() == THREADS.keys()
    for path, source in starting.items():
        assert THREADS[path] != "use_in_thread" or "use_in_thread" in source, path


# --- the same, in processes that take their torch for a CUDA build

SIMULATED = """
import torch
torch.version.cuda = "13.0"
torch._C._accelerator_getAccelerator = lambda: torch.device("cuda")
assert torch.accelerator.current_accelerator() is not None
assert torch.accelerator.current_accelerator(check_available=True) is None
"""


def ended(program: str, timeout: float) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return subprocess.run(
        [sys.executable, "-c", f"{SIMULATED}\n{program}"],
        cwd=ROOT,
        env=environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


PROGRAMS = {
    "imports everything": """
import importlib, pkgutil, moepp
for module in pkgutil.walk_packages(moepp.__path__, "moepp."):
    if not module.name.endswith("__main__") and ".hf.code" not in module.name:
        importlib.import_module(module.name)
""",
    "collects the tests": """
import pytest
raise SystemExit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider"]))
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_cuda_build_without_a_driver(name, two_at_a_time):
    run = two_at_a_time("name", lambda name: ended(PROGRAMS[name], 280))
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]

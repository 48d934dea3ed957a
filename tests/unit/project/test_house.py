"""The rules of the house: layering, collectives in one file, light import, sizes, portable scripts."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

COLLECTIVES = {
    *("all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "broadcast_object_list", "barrier"),
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_coalesced", "gather", "gather_object"),
    *("reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "monitored_barrier"),
    *("all_to_all", "all_to_all_single", "send", "recv", "isend", "irecv", "batch_isend_irecv"),
    *("send_object_list", "recv_object_list"),
}
# Modules whose attributes of these names are collectives, and modules that hold nothing else.
DISTRIBUTED_MODULES = {"torch.distributed", "torch.distributed.distributed_c10d", "deepspeed.comm"}
COLLECTIVE_MODULES = {"torch.distributed.nn", "torch.distributed.nn.functional"} | {
    "torch.distributed._functional_collectives"
}
HEAVY = ("deepspeed", "megatron", "wandb", "transformers", "matplotlib", "pyarrow", "tokenizers", "hydra", "triton")

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def python_files(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [*files, ROOT / "train.py"] if (ROOT / "train.py").exists() else files


def name_of(path: Path) -> str:
    """moepp/moe/layer.py -> moepp.moe.layer; moepp/moe/__init__.py -> moepp.moe"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package else -1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def collectives_used(source: str) -> list[str]:
    """Uses of collectives in a source text, under whatever name torch.distributed goes there."""
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.name if alias.asname else alias.name.split(".")[0]
                aliases[alias.asname or bound] = bound
                if alias.name in COLLECTIVE_MODULES:
                    found.append(f"line {node.lineno}: {alias.name}")
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                aliases[alias.asname or alias.name] = full
                in_distributed = node.module in DISTRIBUTED_MODULES and alias.name in COLLECTIVES | {"*"}
                if in_distributed or node.module in COLLECTIVE_MODULES or full in COLLECTIVE_MODULES:
                    found.append(f"line {node.lineno}: {full}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node.value).partition(".")
            owner = ".".join(filter(None, (aliases.get(first, first), rest)))
            is_collective = owner in DISTRIBUTED_MODULES and node.attr in COLLECTIVES
            if is_collective or f"{owner}.{node.attr}" in COLLECTIVE_MODULES:
                found.append(f"line {node.lineno}: {owner}.{node.attr}")
    return found


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def shell_scripts() -> list[Path]:
    scripts = [*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch"), ROOT / ".ci/run"]
    return sorted(scripts)


def test_imports_go_one_way():
    """The contracts are in pyproject.toml."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_collectives_are_called_in_comm_alone():
    users = {
        str(path.relative_to(ROOT)): uses
        for path in python_files("moepp", "data_tools")
        if path != ROOT / "moepp/distributed/comm.py" and (uses := collectives_used(path.read_text()))
    }
    assert not users


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.distributed.all_reduce(x)",
        "import torch.distributed as dist\ndist.barrier()",
        "from torch import distributed as d\nsend = d.isend",
        "from torch.distributed import all_gather_object as gather",
        "from torch.distributed import *",
        "import deepspeed.comm as dist\ndist.broadcast(x, 0)",
        "from deepspeed import comm\ncomm.all_to_all_single(x, y)",
        "from torch.distributed.nn.functional import all_to_all_single",
        "import torch\ntorch.distributed.nn.all_reduce(x)",
        "import torch.distributed._functional_collectives as funcol",
    ],
)
def test_collective_check_sees_every_spelling(source):
    assert collectives_used(source)


def test_collective_check_lets_groups_and_other_methods_pass():
    source = "import torch.distributed as dist\ndist.new_group([0])\ndist.get_rank()\nqueue.send(x)\ndist.ReduceOp.SUM"
    assert not collectives_used(source)
    assert collectives_used((ROOT / "moepp/distributed/comm.py").read_text())


def test_import_of_moepp_stays_light():
    probe = f"import sys, moepp; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


def test_files_and_functions_stay_short():
    long = []
    for path in python_files("moepp", "data_tools"):
        source = path.read_text()
        where = path.relative_to(ROOT)
        if (lines := source.count("\n")) > MAX_FILE_LINES:
            long.append(f"{where}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{where}: {node.name} has {lines} lines")
    assert not long, "\n".join(long)


def test_no_file_holds_a_path_of_one_machine():
    folders = ("work", "root", "Users", "mnt", "home", "scratch")
    pattern = re.compile(r"(?<![\w.~$}*\])-])/(?:" + "|".join(folders) + r")/[\w.-]+")
    hits = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures and other binary files
        hits += [f"{path.relative_to(ROOT)}: {hit.group()}" for hit in pattern.finditer(text)]
    assert not hits, "\n".join(hits)


def test_versions_agree():
    with (ROOT / "pyproject.toml").open("rb") as f:
        version = tomllib.load(f)["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f'\n__version__ = "{version}"\n' in (ROOT / "moepp/__init__.py").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("script", shell_scripts(), ids=lambda path: path.name)
def test_shell_script_parses_and_passes_shellcheck(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        checked = subprocess.run(
            ["shellcheck", "-x", "-P", "SCRIPTDIR", str(script)], capture_output=True, text=True, cwd=ROOT
        )
        assert checked.returncode == 0, checked.stdout

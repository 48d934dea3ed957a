"""The rules of the house: layering, collectives in one file, light import, sizes, portable scripts.

What ruff and import-linter can check is configured in pyproject.toml; here is a test that they do.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

HEAVY = ("deepspeed", "megatron", "wandb", "transformers", "matplotlib", "pyarrow", "tokenizers", "hydra", "triton")

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def python_files(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [*files, ROOT / "train.py"] if (ROOT / "train.py").exists() else files


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


# In pyproject.toml: no collective outside comm.py, short lists of parameters, docstrings in the imperative mood.
RULES = {
    "import torch\ntorch.distributed.all_reduce(x)": "TID251",
    "import torch.distributed as dist\ndist.barrier()": "TID251",
    "from torch import distributed as d\nsend = d.isend": "TID251",
    "from torch.distributed import all_gather_object as gather": "TID251",
    "from torch.distributed import *": "F403",
    "import deepspeed.comm as dist\ndist.broadcast(x, 0)": "TID251",
    "from deepspeed import comm\ncomm.all_to_all_single(x, y)": "TID251",
    "from torch.distributed.nn.functional import all_to_all_single": "TID251",
    "import torch\ntorch.distributed.nn.all_reduce(x)": "TID251",
    "import torch.distributed._functional_collectives as funcol": "TID251",
    "import torch\ntorch.distributed.distributed_c10d.all_reduce(x)": "TID251",
    'def f():\n    """Returns x."""\n': "D401",
    'def f(a, b, c, d, e, f, g, h, i, j):\n    """Return a."""\n': "PLR0913",
}


@pytest.mark.parametrize("source", RULES)
def test_ruff_sees_what_the_house_forbids(source):
    found = ruff(source)
    assert RULES[source] in found, found


def test_ruff_lets_groups_and_other_methods_pass():
    source = "import torch.distributed as dist\ndist.new_group([0])\ndist.get_rank()\nqueue.send(x)\ndist.ReduceOp.SUM"
    assert "TID251" not in ruff(source)
    comm = (ROOT / "moepp/distributed/comm.py").read_text()
    assert "TID251" in ruff(comm) and "TID251" not in ruff(comm, "moepp/distributed/comm.py")


def ruff(source: str, name: str = "moepp/example.py") -> str:
    """What ruff reports for a source text at a place in the project."""
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--output-format",
        "concise",
        "--stdin-filename",
        name,
        "-",
    ]
    return subprocess.run(command, input=source, cwd=ROOT, capture_output=True, text=True).stdout


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

"""Every write goes through moepp/io/files.py; what cannot is named here with its reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# (file, call) -> why it is right there. A call that is not in its file any more must leave this list.
ALLOWED = {
    ("moepp/io/files.py", "os.open"): "this is the place",
    ("moepp/io/files.py", "open"): "this is the place",
    ("moepp/io/files.py", "os.replace"): "this is the place",
    ("moepp/io/files.py", "os.rename"): "this is the place",
    ("moepp/io/files.py", "os.link"): "this is the place",
    ("moepp/io/files.py", "shutil.copytree"): "this is the place",
    ("moepp/io/files.py", "shutil.copy2"): "this is the place",
    ("moepp/io/owners.py", "os.open"): "a probe that is removed at once: who owns new files here",
    ("moepp/data/indexed.py", "numpy.memmap"): "mapped for reading",
    ("moepp/data/cache.py", "os.open"): "the lock of a cache that users may share; holds nothing, follows no link",
    ("moepp/ops/cpu/cache.py", "open"): "a file in memory, without a name",
    ("moepp/cli/main.py", "os.open"): "/dev/null",
    ("moepp/distributed/launch.py", "open"): "a line for the launcher, in a file that it made for that",
    ("moepp/data/prepare/pipeline.py", "open"): "in the locked staging folder of a preparation",
    ("moepp/data/prepare/order.py", "open"): "in the locked staging folder of a preparation",
    ("moepp/data/prepare/order.py", "os.replace"): "in the locked staging folder of a preparation",
    ("moepp/data/prepare/order.py", "numpy.memmap"): "mapped for reading",
    (
        "moepp/data/prepare/staging.py",
        "os.replace",
    ): "several files that appear in a fixed order, from the staging folder",
    (
        "moepp/interop/weights/write.py",
        "save_file",
    ): "safetensors writes by name alone; in the hidden folder of an export",
}
WRITERS = {"write_text", "write_bytes", "tofile", "savetxt", "hardlink_to", "symlink_to", "save_pretrained", "to_csv"}
OF_MODULE = {
    "os": {"replace", "rename", "renames", "link", "symlink", "mkfifo", "mknod", "sendfile"},
    "shutil": {"copy", "copy2", "copyfile", "copytree", "move", "make_archive", "unpack_archive"},
    "np": {"save", "savez", "savez_compressed", "savetxt", "memmap"},
    "numpy": {"save", "savez", "savez_compressed", "savetxt", "memmap"},
    "torch": {"save"},
    "logging": {"FileHandler"},
    "pickle": set(),
}
FROM_ANYWHERE = {"save_file", "FileHandler", "RotatingFileHandler", "WatchedFileHandler"}
OPENERS = {"open", "fdopen"}
FLAGS = {"O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND"}


def python_files() -> list[Path]:
    return [*sorted((ROOT / "moepp").rglob("*.py")), *sorted((ROOT / "data_tools").rglob("*.py")), ROOT / "train.py"]


def writes(source: str) -> list[tuple[int, str]]:
    """(line, call) of every call in a source text that makes, changes or renames a file by its name."""
    tree = ast.parse(source)
    aliases = dict(_imports(tree))
    return [
        (node.lineno, found)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and (found := _write(node, aliases)) is not None
    ]


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias.name if alias.asname else alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _write(call: ast.Call, aliases: dict[str, str]) -> str | None:
    function = call.func
    if isinstance(function, ast.Name):
        owner, _, name = aliases.get(function.id, function.id).rpartition(".")
        shown = f"{owner}.{name}" if owner in OF_MODULE else name
    elif isinstance(function, ast.Attribute):
        first, _, rest = ast.unparse(function.value).partition(".")
        owner = ".".join(filter(None, (aliases.get(first, first), rest)))
        name = function.attr
        shown = f"{owner}.{name}" if owner in OF_MODULE else f".{name}"
    else:
        return None
    if owner == "moepp.io.files" or owner == "files":
        return None
    if name in OF_MODULE.get(owner, ()) or name in FROM_ANYWHERE:
        return shown
    if owner == "os" and name == "open":
        return shown if any(flag in ast.unparse(call) for flag in FLAGS) or _is_opaque(call) else None
    if name in OPENERS:
        return (
            shown
            if _opens_for_writing(
                call,
                is_method=not owner.startswith(("io", "gzip", "bz2", "lzma")) and isinstance(function, ast.Attribute),
            )
            else None
        )
    if isinstance(function, ast.Attribute) and owner not in OF_MODULE:
        if name in WRITERS:
            return shown
        if name == "savefig":  # into a stream it is harmless
            is_named = not call.args or "stream" not in ast.unparse(call.args[0])
            return shown if is_named else None
        if name in ("rename", "replace") and len(call.args) == 1 and not call.keywords:
            return shown  # of a Path; str.replace takes two
    return None


def _is_opaque(call: ast.Call) -> bool:
    """Flags that are computed elsewhere."""
    return len(call.args) > 1 and not any("O_RDONLY" in ast.unparse(argument) for argument in call.args[1:])


def _opens_for_writing(call: ast.Call, is_method: bool) -> bool:
    mode = next((keyword.value for keyword in call.keywords if keyword.arg == "mode"), None)
    position = 0 if is_method else 1
    if mode is None and len(call.args) > position:
        mode = call.args[position]
    if mode is None:
        return False
    if isinstance(mode, ast.Constant):
        return isinstance(mode.value, str) and bool(set(mode.value) & set("wax+"))
    return not is_method  # computed: it may be anything


def test_files_are_written_by_moepp_files_alone():
    found = {
        (str(path.relative_to(ROOT)), call): line for path in python_files() for line, call in writes(path.read_text())
    }
    unexpected = [f"{file}:{line}: {call}" for (file, call), line in found.items() if (file, call) not in ALLOWED]
    assert not unexpected, "use moepp.io.files:\n" + "\n".join(unexpected)
    assert not [entry for entry in ALLOWED if entry not in found], "not there any more"


@pytest.mark.parametrize(
    "source",
    [
        "open(p, 'w')",
        "open(p, mode='ab')",
        "open(p, 'r+')",
        "open(p, mode)",
        "p.open('x')",
        "path.open(mode='wb')",
        "import io\nio.open(p, 'w')",
        "import gzip\ngzip.open(p, 'wt')",
        "import os\nos.open(p, os.O_WRONLY | os.O_CREAT)",
        "import os\nos.open(p, flags)",
        "from os import replace\nreplace(a, b)",
        "import os as system\nsystem.rename(a, b)",
        "a.rename(b)",
        "a.replace(b)",
        "p.write_text('x')",
        "p.write_bytes(b'x')",
        "import shutil\nshutil.copyfile(a, b)",
        "from shutil import move\nmove(a, b)",
        "import numpy as np\nnp.save(p, x)",
        "from numpy import savez\nsavez(p, x)",
        "import torch\ntorch.save(x, p)",
        "from torch import save\nsave(x, p)",
        "from safetensors.torch import save_file\nsave_file(x, p)",
        "import logging\nlogging.FileHandler(p)",
        "x.tofile(p)",
        "figure.savefig(path)",
        "figure.savefig(fname='x.png')",
        "import os\nos.link(a, b)",
    ],
)
def test_check_sees_every_way_to_write(source):
    assert writes(source)


@pytest.mark.parametrize(
    "source",
    [
        "open(p)",
        "open(p, 'rb')",
        "open(p, encoding='utf-8')",
        "p.open()",
        "p.open('rb')",
        "import gzip\ngzip.open(p, 'rt')",
        "import os\nos.open(p, os.O_RDONLY)",
        "text.replace('a', 'b')",
        "import dataclasses\ndataclasses.replace(cfg, a=1)",
        "figure.savefig(stream, format='png')",
        "from moepp import files\nfiles.write_whole(p, 'x')\nfiles.move(a, b)",
        "queue.open(chunk)",
        "stream.write(x)",
    ],
)
def test_check_lets_reading_and_strings_pass(source):
    assert not writes(source)


# Who may follow a link to make a folder, for the user has named its path; folders inside a run's are own ones.
NAMED_BY_USER = {
    "moepp/io/files.py": "this is the place",
    "moepp/runs/directory.py": "run.dir itself",
    "moepp/metrics/logs.py": "run.dir itself",
    "moepp/analysis/page_folder.py": "--out, or a folder that was looked at",
    "moepp/evaluation/results.py": "--output, or a folder that was made as an own one",
    "moepp/interop/hf/save.py": "inside the hidden folder of an export",
    "moepp/interop/official/save.py": "inside the hidden folder of an export",
    "moepp/data/prepare/corpora.py": "--output",
    "moepp/data/prepare/train_tokenizer.py": "--output",
    "moepp/data/prepare/mixed.py": "--output",
    "moepp/data/prepare/options.py": "--output and --tokenizer",
}


def test_folders_inside_a_run_are_made_as_own_ones():
    called = [str(path.relative_to(ROOT)) for path in python_files() if "make_folder(" in path.read_text()]
    assert sorted(called) == sorted(NAMED_BY_USER), "use moepp.io.files.make_own_folder, which follows no link"

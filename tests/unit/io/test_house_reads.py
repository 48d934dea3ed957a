"""Files that somebody else may have made are opened by moepp/io/untrusted.py; every other opening is named here.

A pipe, a device, or a file of any size must not make a command wait for ever or fill the memory.
"""

from __future__ import annotations

import ast

import pytest

from tests.unit.io.test_house_writes import ROOT, _imports, _opens_for_writing, python_files

# (file, call) -> why it is right there. A call that is not in its file any more must leave this list.
OWN, SYSTEM, STAGED = "files of this installation", "the system's own", "in the locked staging folder of a preparation"
ALLOWED = {
    ("moepp/io/untrusted.py", "os.open"): "this is the place",
    ("moepp/io/files.py", "os.open"): "writes, and folders to be synced",
    ("moepp/io/files.py", "open"): "writes",
    ("moepp/io/owners.py", "os.open"): "a probe that is removed at once",
    ("moepp/runs/lock.py", "os.open"): "no link, no pipe; read within a limit",
    ("moepp/ops/cpu/cache.py", "os.open"): "no link, no pipe, no file of others; read within a limit",
    ("moepp/ops/cpu/cache.py", "open"): "a descriptor that was checked",
    ("moepp/ops/cpu/build.py", ".read_bytes"): "what the compiler has just made, and " + OWN,
    ("moepp/ops/cpu/build.py", ".read_text"): SYSTEM,
    ("moepp/cpu.py", ".read_text"): SYSTEM,
    ("moepp/distributed/device.py", ".read_text"): SYSTEM,
    ("moepp/distributed/heartbeat.py", ".read_text"): SYSTEM,
    ("moepp/runs/environment.py", ".read_text"): SYSTEM,
    ("moepp/runs/environment.py", ".read_bytes"): OWN,
    ("moepp/analysis/run_state.py", ".read_text"): SYSTEM,
    ("moepp/bench/wandb_cost.py", ".read_text"): SYSTEM,
    ("moepp/bench/train.py", ".read_text"): SYSTEM,
    ("moepp/analysis/page.py", ".read_text"): OWN,
    ("moepp/analysis/page_folder.py", "os.open"): "folders, to remove entries of theirs",
    ("moepp/cli/main.py", ".read_text"): OWN,
    ("moepp/cli/main.py", "os.open"): "/dev/null",
    ("moepp/versions.py", ".read_text"): OWN,
    ("moepp/config/folder.py", ".read_bytes"): OWN,
    ("moepp/evaluation/names.py", ".read_text"): OWN,
    ("moepp/interop/hf/save.py", ".read_bytes"): OWN,
    ("moepp/data/prepare/corpora.py", "open"): OWN,
    ("moepp/distributed/launch.py", "open"): "writes a line for the launcher, in a file that it made for that",
    ("moepp/io/tables.py", "pyarrow.parquet.ParquetFile"): "a stream that is open already",
    ("moepp/io/tables.py", "pyarrow.ipc.open_stream"): "bytes that were read within a limit",
    ("moepp/data/prepare/tables.py", "pyarrow.parquet.ParquetFile"): "a stream that is open already",
    ("moepp/data/prepare/corpora.py", "gzip.GzipFile"): "writes into memory",
    ("moepp/training/profiling.py", ".read_bytes"): "the trace that the profiler has just written",
    ("moepp/data/cache.py", "os.open"): "the lock of a cache; holds nothing, follows no link",
    ("moepp/data/cache.py", "numpy.load"): "Megatron's indices in its cache, mapped",
    ("moepp/data/indexed.py", "numpy.memmap"): "a regular file, as was seen before",
    ("moepp/data/prepare/order.py", "numpy.memmap"): STAGED,
    ("moepp/data/prepare/order.py", "open"): STAGED,
    ("moepp/data/prepare/pipeline.py", "open"): STAGED,
    ("moepp/data/prepare/staging.py", "open"): STAGED,
    ("moepp/data/prepare/staging.py", "os.open"): STAGED,
    ("moepp/data/prepare/staging.py", ".read_bytes"): STAGED,
    ("moepp/data/prepare/mixed.py", ".open"): "a package that pip or apt-get has just downloaded",
    ("moepp/data/prepare/mixed.py", "zipfile.ZipFile"): "a package that pip or apt-get has just downloaded",
    ("moepp/interop/weights/files.py", "safetensors.safe_open"): "a regular file, as was seen before; mapped",
    ("moepp/interop/weights/files.py", "torch.load"): "a regular file, as was seen before; mapped",
    ("moepp/checkpoint/archive.py", "zipfile.ZipFile"): "part of a stream that is open already",
    ("moepp/evaluation/data.py", "gzip.GzipFile"): "bytes that were read within a limit",
    ("moepp/data/prepare/readers.py", "gzip.GzipFile"): "a stream that is open already",
    ("moepp/data/prepare/mixed.py", "gzip.GzipFile"): "writes into memory",
}
METHODS = {"read_text", "read_bytes", "load_from_disk"}
FUNCTIONS = {
    *("numpy.load", "numpy.memmap", "numpy.fromfile", "numpy.loadtxt", "numpy.genfromtxt"),
    *("torch.load", "safetensors.safe_open", "safetensors.torch.load_file", "os.open"),
    *("pyarrow.parquet.read_table", "pyarrow.parquet.ParquetFile", "pyarrow.parquet.read_metadata"),
    *("pyarrow.memory_map", "pyarrow.OSFile", "pyarrow.ipc.open_stream", "pyarrow.ipc.open_file"),
    *("pandas.read_csv", "pandas.read_json", "pandas.read_parquet", "datasets.load_dataset"),
    *("zipfile.ZipFile", "tarfile.TarFile", "gzip.GzipFile", "bz2.BZ2File", "lzma.LZMAFile"),
}
OPENERS = {"open", "io.open", "gzip.open", "bz2.open", "lzma.open", "codecs.open", "tokenize.open"}


def reads(source: str) -> list[tuple[int, str]]:
    """(line, call) of every call in a source text that opens a file by its name and does not only write it."""
    tree = ast.parse(source)
    aliases = dict(_imports(tree))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(call.lineno, found) for call in calls if (found := _read(call, aliases)) is not None]


def _read(call: ast.Call, aliases: dict[str, str]) -> str | None:
    function = call.func
    if isinstance(function, ast.Name):
        name = aliases.get(function.id, function.id)
        return name if name in FUNCTIONS | OPENERS else None
    if not isinstance(function, ast.Attribute):
        return None
    first, _, rest = ast.unparse(function.value).partition(".")
    name = ".".join(filter(None, (aliases.get(first, first), rest, function.attr)))
    if name in FUNCTIONS | OPENERS:
        return name
    if name.startswith("moepp.") or name == "self.open":
        return None
    if function.attr in METHODS:
        return f".{function.attr}"
    is_opened = function.attr == "open" and not _opens_for_writing(call, is_method=True)
    return ".open" if is_opened and not name.startswith(("grad_", "wandb.")) else None


def test_files_of_others_are_opened_in_one_place():
    found = {
        (str(path.relative_to(ROOT)), call): line for path in python_files() for line, call in reads(path.read_text())
    }
    unexpected = [f"{file}:{line}: {call}" for (file, call), line in found.items() if (file, call) not in ALLOWED]
    assert not unexpected, "use moepp.io.untrusted (read_bytes, read_part, open_regular):\n" + "\n".join(unexpected)
    assert not [entry for entry in ALLOWED if entry not in found], "not there any more"


@pytest.mark.parametrize(
    "source",
    [
        "open(p)",
        "open(p, mode)",
        "p.open()",
        "p.open('rb')",
        "p.read_text()",
        "(a / 'b').read_bytes()",
        "import gzip\ngzip.open(p, 'rt')",
        "from io import open\nopen(p)",
        "import os\nos.open(p, os.O_RDONLY)",
        "import numpy as np\nnp.load(p)",
        "from torch import load\nload(p)",
        "import pyarrow.parquet as pq\npq.read_table(p)",
        "import pyarrow.parquet\npyarrow.parquet.ParquetFile(p)",
        "from safetensors import safe_open\nsafe_open(p, 'pt')",
        "import datasets\ndatasets.Dataset.load_from_disk(p)",
        "import zipfile\nzipfile.ZipFile(p)",
    ],
)
def test_check_sees_every_way_to_read(source):
    assert reads(source)


@pytest.mark.parametrize(
    "source",
    [
        "from moepp.io.untrusted import read_bytes\nread_bytes(p, 5)",
        "from moepp.io import untrusted\nuntrusted.read_text(p, 5)",
        "p.open('wb')",
        "stream.read(5)",
        "json.loads(text)",
    ],
)
def test_check_lets_the_place_and_writing_pass(source):
    assert not reads(source)

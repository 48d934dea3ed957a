"""Worker of tests/unit/checkpoint/test_fuzz_loading.py: reads mutated files one by one, says how each ended.

Run as a program: ``python -m tests.fuzz_loading TEMPLATE WORKPLACE KIND FIRST COUNT``. Prints "<number> <outcome>" per
input, and before it "<number> ..." so that the parent knows which one was at work if this process dies.
"""

from __future__ import annotations

import faulthandler
import json
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from moepp.checkpoint import format as fmt
from moepp.checkpoint.storage import TensorReader
from moepp.config import from_dict
from moepp.errors import MoeppError
from moepp.evaluation.load import find_model
from moepp.evaluation.results import read_results
from moepp.interop.weights import TensorFolder
from moepp.metrics.jsonl import read_records
from moepp.runs.directory import RunDir, _read_config

LIMIT_SECONDS, LIMIT_BYTES = 10, 12 << 30
INTERESTING = [
    *(
        b"\0",
        b"\xff",
        b"\x80\x04",
        b"(",
        b"b",
        b"R",
        b".",
        b"u",
        b"e",
        b"}",
        b"]",
        b"[",
        b"{",
        b'"',
        b"\n",
        b"-",
        b"&a ",
    ),
    *(b"*a", b"!!python/name:os.system", b"NaN", b"1e999", b"9" * 5000, b"null", b"true", b"-1", b"[" * 2000, b"../"),
    *(b"\x1b[2J", b"\\ud800", b"\xe2\x80\xae", b"c" + b"os\nsystem\n", b"\x95" + b"\xff" * 8, b"r\xff\xff\xff\xff"),
]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """``data`` with 1 to 6 changes: bits, bytes, cuts, copies, tokens of the formats, numbers."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        place = rng.randrange(len(out) + 1) if out else 0
        length = rng.choice((1, 1, 2, 4, 8, 32, 300))
        kind = rng.randrange(8)
        if kind == 0 and place < len(out):
            out[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[place : place + length] = rng.randbytes(length)
        elif kind == 2:
            del out[place : place + length]
        elif kind == 3:
            start = rng.randrange(len(out) + 1)
            out[place:place] = out[start : start + length]
        elif kind == 4:
            token = rng.choice(INTERESTING)
            out[place : place + rng.choice((0, 1, len(token)))] = token
        elif kind == 5:
            digits = [i for i, byte in enumerate(out) if 48 <= byte < 58]
            if digits:
                at = rng.choice(digits)
                out[at : at + 1] = rng.choice((b"0", b"9", b"99999999999", b"-3", b"1.5", b"true", b'"7"', b"[]"))
        elif kind == 6:
            del out[place:]
        else:
            start = rng.randrange(len(out) + 1)
            part = bytes(out[start : start + length])
            out[place : place + length] = part
    return bytes(out)


def sign(folder: Path) -> None:
    """A manifest that fits, so that what is behind the checksums is reached."""
    files = {file.name: fmt.checksum(file) for file in folder.iterdir() if file.name != fmt.MANIFEST}
    (folder / fmt.MANIFEST).unlink()
    fmt.write_manifest(folder, files)


def read_checkpoint(folder: Path) -> None:
    problems = fmt.verify(folder)
    if problems:
        assert all(problem.isprintable() for problem in problems), problems
        raise MoeppError(problems[0])
    reader = TensorReader(folder)
    reader.fill({key: torch.zeros(shape) for key, shape in reader.shapes.items()})
    fmt.read_info(folder)


def read_signed(folder: Path) -> None:
    sign(folder)
    read_checkpoint(folder)
    find_model(str(folder))


def read_folder(folder: Path) -> None:
    tensors = TensorFolder(folder)
    for key in tensors.shapes:
        tensors.read(key)
    find_model(str(folder))


def read_run(folder: Path) -> None:
    from_dict(_read_config(RunDir(folder)))


# Kind -> (folder of the template, file that is changed, how it is read).
KINDS: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "index": ("step-00000010", ".metadata", read_signed),
    "archive": ("step-00000010", "__0_0.distcp", read_signed),
    "info": ("step-00000010", "info.json", read_signed),
    "manifest": ("step-00000010", "manifest.json", read_checkpoint),
    "safetensors": ("weights", "model.safetensors", read_folder),
    "weight index": ("shards", "model.safetensors.index.json", read_folder),
    "bin": ("bin", "pytorch_model.bin", read_folder),
    "released config": ("weights", "config.json", read_folder),
    "own config": ("own", "config.json", read_folder),
    "run config": ("run", "config.yaml", read_run),
    "metrics": ("run", "metrics.jsonl", lambda folder: read_records(folder / "metrics.jsonl") and None),
    "results": ("run", "results.json", lambda folder: read_results(folder / "results.json") and None),
}


def run_one(template: Path, workplace: Path, kind: str, number: int) -> str:
    folder_name, file_name, read = KINDS[kind]
    folder = workplace / folder_name
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(template / folder_name, folder)
    before = sorted(path.name for path in folder.iterdir())
    file = folder / file_name
    file.write_bytes(mutated(file.read_bytes(), random.Random(f"{kind} {number}")))
    try:
        read(folder)
        outcome = "read"
    except MoeppError as error:
        message = str(error)
        outcome = "refused" if message.isprintable() and len(message) < 5000 else f"BAD MESSAGE {message!r:.300}"
    except BaseException as error:
        outcome = f"ESCAPED {type(error).__name__} {error!r:.300}"
    if before != sorted(path.name for path in folder.iterdir()) or sorted(workplace.iterdir()) != [folder]:
        outcome = f"WROTE {sorted(path.name for path in workplace.rglob('*'))}"
    shutil.rmtree(folder)
    return outcome


def main() -> None:
    template, workplace, kind, first, count = sys.argv[1:]
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a hang ends the process, whatever it is in
    torch.set_num_threads(1)
    for number in range(int(first), int(first) + int(count)):
        print(json.dumps({"number": number}), flush=True)
        signal.alarm(LIMIT_SECONDS)
        outcome = run_one(Path(template), Path(workplace), kind, number)
        signal.alarm(0)
        print(json.dumps({"number": number, "outcome": outcome}), flush=True)


if __name__ == "__main__":
    main()

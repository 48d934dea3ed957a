"""Damaged text, tokenizers, prepared data and configurations: each is refused in one line or read right.

Every case goes through the command in a child process, so that an abort or an endless loop is seen as such. What is
read is compared with slow readers of a few lines, through the token ids that were written.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from moepp.cli.main import main
from moepp.config import configs_folder, from_hydra, to_dict
from moepp.data import check_data
from moepp.data.indexed import open_indexed
from moepp.data.prepare.pipeline import PrepareOptions, prepare
from moepp.data.prepare.readers import ReadOptions
from moepp.data.tokenizer import Tokenizer
from moepp.errors import MoeppError
from moepp.training import sweep
from moepp.training.sources import Sources
from tests.data_files import make_config, open_data

CASES_PER_KIND = 60
PREPARED = ("x.json", "x.idx", "x.bin")  # data that are trained on, or added to
KINDS = ("a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet", "t.json", *PREPARED, "publishing.json", "m.yaml")
TREES = ("t.json", "x.json", "publishing.json")
PLACES = {name: f"out/{name}" for name in PREPARED} | {
    "publishing.json": "out/.x.preparing/publishing.json",
    "m.yaml": "own/model/m.yaml",
}
VOCABULARY = 300
ENDS = ("read", "refused")
CPU_SECONDS = 10.0  # of one case
MAX_MEMORY_BYTES = 16 << 30  # address space of the child
TEXTS = ["plain words", "naïve – 日本語 🙂", "", "  spaces\tand tabs ", 'quotes " and \\ slashes', "x" * 300, "last"]
BITS = [
    *(b"\xff", b"\x00", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"null"),
    *(b'{"text":', b"[", b"]", b"}", b'"', b"NaN", b"9" * 5000, b"[" * 2000, b'"text": "twice", ', b"\x1b[2J", b"-1"),
]
VALUES: list[Any] = [
    *(None, True, -1, 0, 3, 2**31, 2**40, 1.5, "", "a", "ByteLevel", "Replace", "Regex", "(x+x+)+y", [], {}),
]


def _good(name: str, folder: Path) -> bytes:
    """The undamaged file."""
    lines = "".join(json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(TEXTS))
    if name == "a.jsonl":
        return lines.encode()
    if name == "a.jsonl.gz":
        return gzip.compress(lines.encode(), mtime=0)
    if name == "a.txt":
        return "\n".join(TEXTS).encode()
    if name == "t.json":
        return (folder / "good.json").read_bytes()
    if name in PREPARED:
        return (folder / "good" / name).read_bytes()
    if name == "publishing.json":
        return json.dumps({"files": [{"path": "out/x.bin", "inode": 7}], "last": "out/x.idx"}).encode()
    if name == "m.yaml":
        return (configs_folder() / "model/tiny.yaml").read_bytes()
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS}), sink, row_group_size=3)
    return sink.getvalue()


def _mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 2, 8, 40))
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = rng.choice(BITS)
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            del data[at:]
        else:
            data[at : at + length] = rng.randbytes(length)
    return bytes(data)


def _mutate_tree(content: bytes, rng: random.Random) -> bytes:
    tree = json.loads(content)
    for _ in range(rng.choice((1, 1, 2))):
        places: list[tuple[Any, Any]] = []
        waiting = [tree]
        while waiting:
            node = waiting.pop()
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if len(keys) > 40:
                keys = rng.sample(keys, 3)  # of the vocabulary, a few
            places += [(node, key) for key in keys]
            waiting += [node[key] for key in keys if isinstance(node[key], dict | list)]
        node, key = rng.choice(places)
        if rng.random() < 0.2:
            del node[key]
        elif rng.random() < 0.2:
            node[key] = json.loads(json.dumps(rng.choice(places)[0]))
        else:
            node[key] = rng.choice(VALUES)
    return json.dumps(tree).encode()


def _case(name: str, good: bytes, number: int) -> bytes:
    rng = random.Random(f"{name} {number}")
    if name in TREES and rng.random() < 0.8:
        return _mutate_tree(good, rng)
    if name == "a.jsonl.gz" and rng.random() < 0.5:  # damage that its checksum does not show
        return gzip.compress(_mutate_bytes(gzip.decompress(good), rng), mtime=0)
    return _mutate_bytes(good, rng)


# Slow readers: the texts of a file, or None where it must be refused.


def _expected_jsonl(content: bytes) -> list[str] | None:
    texts = []
    for number, line in enumerate(content.split(b"\n")):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
        if not line.strip():
            continue
        try:
            pairs: Any = json.loads(line.decode(), parse_int=float, object_pairs_hook=lambda pairs: ["object", pairs])
            found = [value for key, value in pairs[1] if key == "text"] if pairs[0] == "object" else []
            (text,) = found
            text.encode()
        except (ValueError, AttributeError, TypeError, IndexError, KeyError, RecursionError):
            return None
        texts.append(text)
    return texts


def _expected_gzip(content: bytes) -> list[str] | None:
    try:
        return _expected_jsonl(gzip.decompress(content))
    except (OSError, EOFError, zlib.error):
        return None


def _expected_txt(content: bytes) -> list[str] | None:
    try:
        text = content.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        return None
    return [line.removesuffix("\r") for line in text.split("\n")]


def _expected_parquet(content: bytes) -> list[str] | None:
    import pyarrow
    import pyarrow.parquet

    try:
        texts = pyarrow.parquet.read_table(io.BytesIO(content), columns=["text"]).column("text").to_pylist()
    except Exception:  # whatever arrow says of damage
        return None
    return texts if texts and all(isinstance(text, str) for text in texts) else None


EXPECTED: dict[str, Callable[[bytes], list[str] | None]] = {
    "a.jsonl": _expected_jsonl,
    "a.jsonl.gz": _expected_gzip,
    "a.txt": _expected_txt,
    "a.parquet": _expected_parquet,
}


def _command(name: str, content: bytes, folder: Path) -> Callable[[], int]:
    """Write the damaged file and what it needs beside it; returns what reads it, from the folder, with an exit code."""
    place = folder / PLACES.get(name, f"in/{name}")
    if name in PREPARED:
        shutil.copytree(folder.parent / "good", folder / "out")
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    place.write_bytes(content)
    if name == "m.yaml":
        plan = ["plan", "--ranks", "1", "--config-dir", "own", "model=m", "engine=native"]
        return lambda: main([*plan, "data.tokenizer=null", "train.samples=0", "train.eval_batches=0"])
    given = name if name in EXPECTED else "plain.txt"
    if name not in EXPECTED:
        (folder / "in").mkdir(exist_ok=True)
        (folder / "in" / given).write_text("\n".join(TEXTS), encoding="utf-8")
    tokenizer = f"in/{name}" if name == "t.json" else str(folder.parent / "good.json")
    argv = ["prepare", f"in/{given}", "--output", "out/x", "--tokenizer", tokenizer, "--workers", "1", "--no-progress"]
    if name in PREPARED and zlib.crc32(content) % 2:
        return _train
    return lambda: main([*argv, "--text-unit", "line", *(["--append"] if name in PREPARED else [])])


def _train() -> int:
    """Read what a run on out/x would."""
    cfg = make_config(["out/x"], model__vocab_size=VOCABULARY, data__split="1,0,0", train__eval_batches=0)
    try:
        check_data(cfg)
        data = open_data(cfg)
        for step in range(cfg.train.steps):
            inputs_BS, labels_BS = data.train_batch(step, 0)
            assert all(ids.min() >= 0 and ids.max() < VOCABULARY for ids in (inputs_BS, labels_BS))
    except MoeppError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(name: str, content: bytes, folder: Path) -> tuple[int, str]:
    """Exit code and stderr of the command, whose working directory is ``folder``."""
    folder.mkdir()
    command = _command(name, content, folder)
    os.chdir(folder)
    descriptor, saved = os.open("stderr.txt", os.O_RDWR | os.O_CREAT), os.dup(2)
    os.dup2(descriptor, 2)
    try:
        with (
            open(2, "w", closefd=False) as stream,
            contextlib.redirect_stderr(stream),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            code = command()
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(descriptor)
    return code, Path("stderr.txt").read_text()


def _files(folder: Path) -> dict[str, bytes]:
    names = (path for path in folder.rglob("*") if path.is_file() and path.name != "stderr.txt")
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


def _judge(name: str, content: bytes, folder: Path, code: int, stderr: str) -> str:
    """'read' or 'refused', or what is wrong."""
    files = _files(folder)
    good = {f"out/{part}": (folder.parent / "good" / part).read_bytes() for part in PREPARED}
    before = {PLACES.get(name, f"in/{name}"): content}
    if name in PREPARED:
        before = good | before
    if name not in EXPECTED and name != "m.yaml":
        before |= {"in/plain.txt": "\n".join(TEXTS).encode()}
    if code == 2:
        if files != before:
            return f"refused and left {sorted(files)}"
        line = stderr.removesuffix("\n")
        is_clear = line.startswith("error: ") and "\n" not in line and line.isprintable() and len(line) < 1000
        return "refused" if is_clear else f"not one line: {stderr[:500]!r}"
    if code != 0:
        return f"exit code {code}"
    if name == "m.yaml":
        return _judge_model(content)
    if files == before and name in PREPARED:  # trained on
        return _judge_prepared(name, content, good, folder, added=0)
    made = set(files) - set(before)
    if name in PREPARED:
        return _judge_prepared(name, files["out/x.bin"], good, folder, added=6) if not made else f"made {made}"
    if files.keys() - {PLACES.get(name)} != before.keys() - {PLACES.get(name)} | set(good):
        return f"files {sorted(files)}"
    return _judge_text(name, content, folder)


def _judge_model(content: bytes) -> str:
    """Plain values of the file are those of the model."""
    sources = Sources(str(configs_folder()), "own", "config")
    found = to_dict(from_hydra(sweep.configuration(sources, ["model=m", "data.paths=[x]"])).model)
    given = yaml.safe_load(content)
    wrong = {k: v for k, v in given.items() if isinstance(v, int | float | None) and found[k] != v}
    return "read" if not wrong else f"{wrong} read as {found}"


def _judge_prepared(name: str, content: bytes, good: dict[str, bytes], folder: Path, added: int) -> str:
    """The documents are the good ones, whose tokens only a .bin can change; ``added`` ones follow."""
    kept = open_indexed(str(folder / "out/x"))
    old = open_indexed(str(folder.parent / "good/x"))
    if kept.lengths_Q.tolist()[: old.documents] != old.lengths_Q.tolist() or kept.documents != old.documents + added:
        return f"documents of {kept.lengths_Q} tokens"
    return "read" if name == "x.bin" or not added or content.startswith(good["out/x.bin"]) else "another text"


def _judge_text(name: str, content: bytes, folder: Path) -> str:
    """The prepared documents are those of the file."""
    file = open_indexed(str(folder / "out/x"))
    tokenizer = Tokenizer(str(folder / "in/t.json" if name == "t.json" else folder.parent / "good.json"))
    ends = file.lengths_Q.cumsum().tolist()
    tokens = file.tokens_T().tolist()
    documents = [tokens[begin : end - 1] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    if name not in EXPECTED:
        texts = [text for text in TEXTS if text.strip()]
        same = [tokenizer.encode(text) for text in texts]
        kept = [ids for ids in same if ids]
        return "read" if documents == kept else f"{documents} instead of {kept}"
    texts = EXPECTED[name](content)
    if texts is None:
        return "read, and it should be refused"
    texts = [text for text in texts if text.strip()]
    found = [tokenizer.decode(ids) for ids in documents]
    return "read" if found == texts else f"{found} instead of {texts}"


def _cases(names: Sequence[str]) -> list[tuple[str, int]]:
    return [(name, number) for name in names for number in range(CASES_PER_KIND)]


def _child(sender: Any, names: Sequence[str], root: str, first: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    good = {name: _good(name, Path(root)) for name in names}
    for name in names:
        code, stderr = _run(name, good[name], Path(root) / f"{name}-imports-{first}")  # so that no case pays for them
        assert code == 0, (name, stderr)
    for name, number in _cases(names)[first:]:
        folder = Path(root) / f"{name}-{number}"
        content = _case(name, good[name], number)
        start = time.process_time()
        try:
            verdict = _judge(name, content, folder, *_run(name, content, folder))
        except BaseException as error:  # tracebacks, panics, exits
            verdict = f"{type(error).__name__}: {error}"
        seconds = time.process_time() - start
        sender.send(verdict if seconds < CPU_SECONDS else f"took {seconds:.1f} s")


def _fuzz(names: Sequence[str], root: Path) -> dict[tuple[str, int], str]:
    context, cases = multiprocessing.get_context("spawn"), _cases(names)
    verdicts: list[str] = []
    while len(verdicts) < len(cases):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(sender, names, str(root), len(verdicts)))
        process.start()
        sender.close()
        try:
            while len(verdicts) < len(cases):
                if not receiver.poll(120):
                    raise EOFError
                verdicts.append(receiver.recv())
        except EOFError:
            verdicts.append(f"process hung or ended: {process.exitcode}")
        process.kill()
        process.join()
    return dict(zip(cases, verdicts, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_damaged_inputs_are_refused_in_one_line_or_read_right(tmp_path: Path) -> None:
    from moepp.data.prepare.train_tokenizer import train_tokenizer

    (tmp_path / "good.json").write_text(train_tokenizer(iter(TEXTS), VOCABULARY), encoding="utf-8")
    (tmp_path / "good").mkdir()
    (tmp_path / "plain.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    options = PrepareOptions(str(tmp_path / "good/x"), str(tmp_path / "good.json"), read=ReadOptions(text_unit="line"))
    prepare([str(tmp_path / "plain.txt")], options)
    outside = {path.name for path in tmp_path.iterdir()}
    counts: Counter[str] = Counter()
    wrong = []
    with ThreadPoolExecutor(2) as two_at_a_time:  # each waits for a process of its own
        found = list(two_at_a_time.map(lambda names: _fuzz(names, tmp_path), (KINDS[::2], KINDS[1::2])))
    verdicts = found[0] | found[1]
    for name in KINDS:
        by_verdict = Counter(verdicts[name, number] for number in range(CASES_PER_KIND))
        wrong += [f"{name} {n}: {verdicts[name, n]}" for n in range(CASES_PER_KIND) if verdicts[name, n] not in ENDS]
        print(f"{name}: {CASES_PER_KIND} inputs, {by_verdict['read']} read, {by_verdict['refused']} refused")
        counts += by_verdict
        least_read = 0 if name == "x.idx" else 2  # every byte of an index counts
        assert by_verdict["refused"] >= 10 and by_verdict["read"] >= least_read, (name, by_verdict)
    assert not wrong, "\n".join(wrong)
    assert counts.total() == len(KINDS) * CASES_PER_KIND == 600
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(KINDS)} == outside

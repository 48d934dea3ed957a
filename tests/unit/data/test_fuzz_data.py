"""Damaged text files and tokenizers, by the hundreds: each is refused in one line or read right, whatever it holds.

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
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

CASES_PER_KIND = 160
KINDS = ("a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet", "t.json")
CPU_SECONDS = 10.0  # of one case
MAX_MEMORY_BYTES = 16 << 30  # address space of the child
TEXTS = ["plain words", "naïve – 日本語 🙂", "", "  spaces\tand tabs ", 'quotes " and \\ slashes', "x" * 300, "last"]
BITS = [
    *(b"\xff", b"\x00", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"null"),
    *(b'{"text":', b"[", b"]", b"}", b'"', b"NaN", b"9" * 5000, b"[" * 2000, b'"text": "twice", ', b"\x1b[2J", b"-1"),
]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    2**31,
    2**40,
    1.5,
    "",
    "a",
    "ByteLevel",
    "Replace",
    "Regex",
    "(x+x+)+y",
    [],
    {},
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
    if name == "t.json" and rng.random() < 0.8:
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


def _run(name: str, content: bytes, folder: Path) -> tuple[int, str]:
    """Exit code and stderr of the command, whose working directory is ``folder``."""
    from moepp.cli.main import main

    (folder / "in").mkdir(parents=True)
    (folder / "in" / name).write_bytes(content)
    given = name if name != "t.json" else "plain.txt"
    if name == "t.json":
        (folder / "in" / given).write_text("\n".join(TEXTS), encoding="utf-8")
    tokenizer = f"in/{name}" if name == "t.json" else str(folder.parent / "good.json")
    argv = ["prepare", f"in/{given}", "--output", "out/x", "--tokenizer", tokenizer, "--workers", "1"]
    os.chdir(folder)
    descriptor, saved = os.open("stderr.txt", os.O_RDWR | os.O_CREAT), os.dup(2)
    os.dup2(descriptor, 2)
    try:
        with (
            open(2, "w", closefd=False) as stream,
            contextlib.redirect_stderr(stream),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            code = main([*argv, "--no-progress", "--text-unit", "line"])
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(descriptor)
    return code, Path("stderr.txt").read_text()


def _judge(name: str, content: bytes, folder: Path, code: int, stderr: str) -> str:
    """'read' or 'refused', or what is wrong."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    expected_names = {"in", f"in/{name}", "stderr.txt"} | ({"in/plain.txt"} if name == "t.json" else set())
    if code == 2:
        if names - {"out"} != expected_names:
            return f"refused and left {names}"
        line = stderr.removesuffix("\n")
        good = line.startswith("error: ") and "\n" not in line and line.isprintable() and len(line) < 1000
        return "refused" if good else f"not one line: {stderr[:500]!r}"
    if code != 0 or names != expected_names | {"out", "out/x.bin", "out/x.idx", "out/x.json"}:
        return f"exit code {code}, files {names}"
    from moepp.data.indexed import open_indexed
    from moepp.data.tokenizer import Tokenizer

    file = open_indexed(str(folder / "out/x"))
    tokenizer = Tokenizer(str(folder / "in/t.json" if name == "t.json" else folder.parent / "good.json"))
    ends = file.lengths_Q.cumsum().tolist()
    tokens = file.tokens_T().tolist()
    documents = [tokens[begin : end - 1] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    if name == "t.json":
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


def _child(sender: Any, name: str, root: str, first: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    good = _good(name, Path(root))
    _run(name, good, Path(root) / f"{name}-imports-{first}")  # so that no case pays for them
    for number in range(first, CASES_PER_KIND):
        folder = Path(root) / f"{name}-{number}"
        content = _case(name, good, number)
        start = time.process_time()
        try:
            verdict = _judge(name, content, folder, *_run(name, content, folder))
        except BaseException as error:  # tracebacks, panics, exits
            verdict = f"{type(error).__name__}: {error}"
        seconds = time.process_time() - start
        sender.send((number, verdict if seconds < CPU_SECONDS else f"took {seconds:.1f} s"))


def _fuzz(name: str, root: Path) -> dict[int, str]:
    context = multiprocessing.get_context("spawn")
    verdicts: dict[int, str] = {}
    while len(verdicts) < CASES_PER_KIND:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(sender, name, str(root), len(verdicts)))
        process.start()
        sender.close()
        try:
            while len(verdicts) < CASES_PER_KIND:
                if not receiver.poll(120):
                    raise EOFError
                number, verdict = receiver.recv()
                verdicts[number] = verdict
        except EOFError:
            verdicts[len(verdicts)] = f"process hung or ended: {process.exitcode}"
        process.kill()
        process.join()
    return verdicts


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_damaged_inputs_are_refused_in_one_line_or_read_right(tmp_path: Path) -> None:
    from moepp.data.prepare.train_tokenizer import train_tokenizer

    (tmp_path / "good.json").write_text(train_tokenizer(iter(TEXTS), 300), encoding="utf-8")
    outside = {path.name for path in tmp_path.iterdir()}
    counts: Counter[str] = Counter()
    wrong = []
    with ThreadPoolExecutor(2) as two_at_a_time:  # each waits for a process of its own
        found = list(two_at_a_time.map(lambda name: _fuzz(name, tmp_path), KINDS))
    for name, verdicts in zip(KINDS, found, strict=True):
        assert sorted(verdicts) == list(range(CASES_PER_KIND))
        wrong += [f"{name} {n}: {verdict}" for n, verdict in verdicts.items() if verdict not in ("read", "refused")]
        by_verdict = Counter(verdicts.values())
        print(f"{name}: {CASES_PER_KIND} inputs, {by_verdict['read']} read, {by_verdict['refused']} refused")
        counts += by_verdict
        assert by_verdict["refused"] >= 20 and by_verdict["read"] >= 5, (name, by_verdict)
    assert not wrong, "\n".join(wrong)
    assert counts.total() == len(KINDS) * CASES_PER_KIND == 800
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(KINDS)} == outside

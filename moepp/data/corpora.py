"""The data of a run, opened once at its start and handed down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from moepp.config import Config
from moepp.data.identity import identify, identify_like
from moepp.data.indexed import IndexedFile, allow_open_files, open_indexed
from moepp.data.vocabulary import Vocabulary, read_vocabulary


class SavedState(Protocol):
    """What the trainer has kept of the data."""

    @property
    def data(self) -> Mapping[str, Mapping[str, Any]]: ...  # identity of each dataset by path


class SavedRun(Protocol):
    """What a checkpoint tells of the data that it was trained on."""

    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def run_state(self) -> SavedState: ...
    @property
    def eod_id(self) -> int | None: ...
    @property
    def tokenizer_sha256(self) -> str | None: ...


@dataclass(frozen=True)
class Corpora:
    """The indexed files of ``data.paths``, in that order, and what they tell of their vocabulary.

    Attributes:
        files: opened and whole.
        vocabulary: of all of them.
        tokenizer: ``data.tokenizer``.
        validation: the files of each set of ``data.validation``; they are evaluated alone, and a run may change them.
    """

    files: tuple[IndexedFile, ...]
    vocabulary: Vocabulary
    tokenizer: str | None = None
    validation: Mapping[str, tuple[IndexedFile, ...]] = field(default_factory=dict)

    @cached_property
    def identity(self) -> dict[str, dict[str, Any]]:
        """What tells each dataset from another one, wherever it lies, by path."""
        return {file.prefix: identify(file) for file in self.files}

    def differences(self, saved: SavedRun) -> list[str]:
        """Return a line for each dataset, and for the tokenizer, that differs from the saved run's."""
        old = saved.run_state.data
        if not old:
            return []  # nothing was trained on: any data may follow
        old_paths, new_paths = list(saved.config["data"]["paths"]), [file.prefix for file in self.files]
        if len(old_paths) != len(new_paths):
            return [f"data.paths: {old_paths} -> {new_paths}"]
        found = []
        for old_path, file in zip(old_paths, self.files, strict=True):
            where = file.prefix if file.prefix == old_path else f"{old_path} -> {file.prefix}"
            was = old.get(old_path, {})
            now = identify_like(was, file)
            found += [f"data.paths: {where}: {key} {was[key]} -> {now[key]}" for key in was if was[key] != now.get(key)]
        for name, key in (("eod_id", "data.paths"), ("tokenizer_sha256", "data.tokenizer")):
            was, now = getattr(saved, name), getattr(self.vocabulary, name)
            if was is not None and now is not None and was != now:
                found.append(f"{key}: {name} {was} -> {now}")
        return found or self._unknown_tokenizer(saved)

    def _unknown_tokenizer(self, saved: SavedRun) -> list[str]:
        """Return the problem of a changed tokenizer file when nothing records which one made the data."""
        was, now = saved.config["data"].get("tokenizer"), self.tokenizer
        is_known = saved.tokenizer_sha256 is not None or any(file.manifest for file in self.files)
        if is_known or was is None or now is None or was == now:
            return []
        return [f"data.tokenizer: {was} -> {now}"]


def open_corpora(cfg: Config) -> Corpora:
    """Open ``data.paths`` and ``data.validation``; :func:`moepp.data.check_data` also sees whether they can be used.

    Raises:
        DataError: missing or corrupt files.
    """
    allow_open_files()
    files = tuple(open_indexed(prefix) for prefix in cfg.data.paths)
    validation = {name: open_validation(name, cfg) for name in cfg.data.validation}
    return Corpora(files, read_vocabulary(cfg, files), cfg.data.tokenizer, validation)


def open_validation(name: str, cfg: Config) -> tuple[IndexedFile, ...]:
    """Open the files of one set of ``data.validation``; errors as of :func:`open_corpora`."""
    return tuple(open_indexed(prefix, key=f"data.validation.{name}") for prefix in cfg.data.validation[name])

"""Which files are read: files, folders and globs turned into a list, and a word about everything that is not read."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field

from moepp.data.remedies import read_remedy
from moepp.errors import DataError
from moepp.io.untrusted import printable

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
NAMES_SHOWN = 3

# Why something in a folder is not read.
HIDDEN = "hidden"
OTHER_KIND = "of another kind"
NOT_REGULAR = "not a regular file"
DANGLING = "a link to nothing"
VANISHED = "gone since the folder was listed"
AGAIN = "a link to what is read already"


@dataclass(frozen=True)
class InputFile:
    """A file to read, as it was when it was found."""

    path: str
    bytes: int
    changed_ns: int  # time of its last change

    def require_unchanged(self, status: os.stat_result) -> None:
        """Refuse a file that is another one than it was when it was found.

        Raises:
            DataError: size or time of the last change differ.
        """
        if (status.st_size, status.st_mtime_ns) != (self.bytes, self.changed_ns):
            raise DataError(f"{printable(self.path)} changed while the input was read; start again when it is whole")


@dataclass
class Inputs:
    """The files to read, in order, and what was left out (reason: paths)."""

    files: list[InputFile] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, path: str) -> None:
        self.left_out.setdefault(reason, []).append(path)

    def remarks(self) -> list[str]:
        """Return one line for each reason: how many were left out, and the first names."""
        return [f"left out {len(paths):,} {reason}: {_names(sorted(paths))}" for reason, paths in self.left_out.items()]


def has_kind(path: str, *suffixes: str) -> bool:
    """Return whether a name ends in one of the suffixes, in whatever case."""
    return path.lower().endswith(suffixes)


def find_inputs(inputs: Sequence[str]) -> Inputs:
    """Return the files that names, folders (recursively, sorted by path) and glob patterns give, each once.

    Links to files and folders are followed. In a folder, hidden names and names with other endings are left out, and
    listed in the result; what is named itself must be readable.

    Raises:
        DataError: nothing matches, a file of another kind was named, or a file or folder cannot be read.
    """
    found = Inputs()
    seen: dict[object, str] = {}
    for entry in inputs:
        matched = 0
        for path in _matches(entry):
            files = _files_below(path, found) if os.path.isdir(path) else [path]
            matched += len(files)
            for file in files:
                _add(file, found, seen)
        if matched == 0:
            also = "".join(f" ({remark})" for remark in found.remarks())
            raise DataError(
                f"folder {printable(entry)} holds no file ending in {', '.join(SUFFIXES)}{also}; name another"
            )
    return found


def _matches(entry: str) -> list[str]:
    """Return the entry itself, or the files and folders that its pattern matches."""
    if os.path.isdir(entry) or os.path.isfile(entry):
        return [entry]
    if os.path.exists(entry):
        raise DataError(f"input {printable(entry)} is not a regular file; write it to one first")
    paths = sorted(path for path in glob.glob(entry, recursive=True) if os.path.isfile(path) or os.path.isdir(path))
    if not paths:
        raise DataError(f"input {printable(entry)} matches no file below {os.getcwd()}; check its spelling")
    return paths


def _add(path: str, found: Inputs, seen: dict[object, str]) -> None:
    if not has_kind(path, *SUFFIXES):
        raise DataError(f"input {printable(path)} does not end in {', '.join(SUFFIXES)}; convert or rename it")
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read {printable(path)}: {error.strerror}; {read_remedy(error)}") from error
    if not os.access(path, os.R_OK):
        raise DataError(f"cannot read {printable(path)}: Permission denied; check its permissions")
    identity = _identity(path, status)
    if identity not in seen:
        seen[identity] = path
        found.files.append(InputFile(path, status.st_size, status.st_mtime_ns))
    elif seen[identity] != path:  # the same name twice is read once, as everybody expects
        found.leave_out(AGAIN, path)


def _identity(path: str, status: os.stat_result) -> object:
    """Return a key that is the same for all names of one file or folder."""
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _files_below(root: str, found: Inputs) -> list[str]:
    """Return the files of known kinds below a folder, sorted by path; each folder once, as links may loop."""
    visited = {_identity(parent, os.stat(parent)) for parent in _parents(root)}
    files, waiting = [], [root]
    while waiting:
        folder = waiting.pop()
        try:
            identity = _identity(folder, os.stat(folder))
            if identity in visited:
                found.leave_out(AGAIN, folder)
                continue
            visited.add(identity)
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise DataError(
                f"cannot read folder {printable(folder)}: {error.strerror}; check its permissions, or name its files"
            ) from error
        folders = []
        for path in (os.path.join(folder, name) for name in names):
            if _is_folder(path, found):
                folders.append(path)
            elif _is_wanted(path, found):
                files.append(path)
        waiting += reversed(folders)
    return sorted(files)


def _parents(folder: str) -> list[str]:
    """Return the parents of a folder: a link to one of them is a loop."""
    path, parents = os.path.realpath(folder), []
    while (parent := os.path.dirname(path)) != path:
        parents.append(parent)
        path = parent
    return parents


def _is_folder(path: str, found: Inputs) -> bool:
    return os.path.isdir(path) and not _left_out_as_hidden(path, found)


def _left_out_as_hidden(path: str, found: Inputs) -> bool:
    hidden = os.path.basename(path).startswith(".")
    if hidden:
        found.leave_out(HIDDEN, path)
    return hidden


def _is_wanted(path: str, found: Inputs) -> bool:
    """Return whether a name in a folder is a file to read; say so if not."""
    if os.path.isdir(path) or _left_out_as_hidden(path, found):
        return False
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path) and has_kind(path, *SUFFIXES):
            raise DataError(f"{printable(path)} is a link to nothing; remove it, or restore what it names") from None
        found.leave_out(DANGLING if os.path.islink(path) else VANISHED, path)
        return False
    except OSError as error:
        raise DataError(f"cannot read {printable(path)}: {error.strerror}; {read_remedy(error)}") from error
    if not has_kind(path, *SUFFIXES):
        found.leave_out(OTHER_KIND, path)
        return False
    if not stat.S_ISREG(mode):
        found.leave_out(NOT_REGULAR, path)
        return False
    return True


def _names(paths: list[str]) -> str:
    shown = ", ".join(printable(path, 100) for path in paths[:NAMES_SHOWN])
    return shown + (", ..." if len(paths) > NAMES_SHOWN else "")

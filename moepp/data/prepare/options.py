"""What ``moepp prepare`` is told, and what it refuses before any work."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from moepp.data.prepare.inputs import InputFile
from moepp.data.prepare.readers import ReadOptions
from moepp.errors import DataError
from moepp.io.files import make_folder
from moepp.io.untrusted import printable

MAX_LOST_SHARE = 0.01


@dataclass(frozen=True)
class PrepareOptions:
    """How to turn text into PREFIX.bin, PREFIX.idx and PREFIX.json."""

    output: str  # PREFIX
    tokenizer: str  # path of tokenizer.json
    train_vocab: int | None = None  # train a tokenizer of this many tokens on the input first, and write it
    read: ReadOptions = field(default_factory=ReadOptions)
    eod_token: str | None = None  # None: the first of moepp.data.tokenizer.EOD_TOKENS that the tokenizer has
    max_lost_share: float = MAX_LOST_SHARE  # of the characters, which the tokenizer may be unable to represent
    shuffle: int | None = None  # seed of the order of the documents; None: the order of the input
    workers: int = 1  # processes
    append: bool = False  # add to what PREFIX holds
    overwrite: bool = False  # replace what PREFIX (and, if it is trained, the tokenizer) holds
    progress: bool = True  # progress bar, on a terminal

    @property
    def outputs(self) -> tuple[str, str, str]:
        """PREFIX.bin, PREFIX.json and PREFIX.idx, in the order in which they appear."""
        return f"{self.output}.bin", f"{self.output}.json", f"{self.output}.idx"

    @property
    def written(self) -> tuple[str, ...]:
        """All files that are written: the outputs, and the tokenizer if it is trained."""
        return self.outputs if self.train_vocab is None else (*self.outputs, self.tokenizer)


def check_options(options: PrepareOptions) -> None:
    """Refuse values that cannot work; DataError."""
    if os.path.basename(options.output) in ("", ".", ".."):
        raise DataError(
            f"--output {printable(options.output)} names a folder; name the files in it, as "
            f"{printable(os.path.join(options.output, 'text'))}"
        )
    if options.workers < 1:
        raise DataError(f"--workers={options.workers} is below 1; give the number of processes")
    if not 0 <= options.max_lost_share <= 1:
        raise DataError(f"--max-lost-share={options.max_lost_share} is not between 0 and 1; give a share such as 0.01")
    if options.shuffle is not None and options.shuffle < 0:
        raise DataError(f"--shuffle={options.shuffle} is below 0; give a seed of 0 or more")


def check_output(options: PrepareOptions) -> None:
    """Refuse to replace what PREFIX holds, or to add to nothing, unless the options say so.

    Raises:
        DataError: the output exists or not, against ``append`` and ``overwrite``.
    """
    prefix = options.output
    present = [path for path in options.outputs if os.path.exists(path)]
    _require_replaceable(options)
    if options.append and options.overwrite:
        raise DataError("--append keeps what the output holds and --overwrite replaces it; give one of them")
    if options.append and not present:
        raise DataError(f"--append: there is no {prefix}.bin/.idx to add to; leave --append out")
    if present and not options.append and not options.overwrite:
        raise DataError(f"{present[0]} exists; choose another --output, or give --append or --overwrite")
    if options.train_vocab is not None and os.path.exists(options.tokenizer) and not options.overwrite:
        raise DataError(f"tokenizer {options.tokenizer} exists; leave training out to use it, or give --overwrite")
    if options.train_vocab is not None:  # found out now, not after the work
        make_folder(parent := os.path.dirname(os.path.abspath(options.tokenizer)))
        if not os.access(parent, os.W_OK | os.X_OK):
            raise DataError(f"cannot write {options.tokenizer}: Permission denied; choose a folder you may write to")


def _require_replaceable(options: PrepareOptions) -> None:
    """Refuse places that no file can take, and files that would be lost."""
    for path in options.written:
        if os.path.isdir(path):
            raise DataError(f"cannot write {printable(path)}: it is a folder; name a file, or remove the folder")
        if os.path.ismount(path):
            raise DataError(f"cannot write {printable(path)}: it is a mount point, which stays; name another file")
    if os.path.realpath(options.tokenizer) in map(os.path.realpath, options.outputs):
        raise DataError(
            f"--tokenizer {printable(options.tokenizer)} is also what --output {printable(options.output)} writes; "
            "choose another --output"
        )


def require_kept(files: list[InputFile], options: PrepareOptions) -> None:
    """Refuse an input that would be replaced: text.json is an input's name and a manifest's."""
    written = {os.path.realpath(path) for path in options.written}
    for file in files:
        if os.path.realpath(file.path) in written:
            raise DataError(f"{printable(file.path)} is an input and would be replaced; choose another --output")

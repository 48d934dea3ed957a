"""The run directory: its layout, who may write in it, and what must agree when a run is continued.

config.yaml            resolved configuration; config.<n>.yaml: those of earlier starts that differed
environment.json       versions, commit, device (never the process environment); environment.<n>.json likewise
metrics.jsonl          one record per line; metrics.jsonl.<n>: of earlier starts that left no checkpoint
routing.jsonl          what the routers did, one snapshot per line; routing.jsonl.<n> likewise
metrics.csv            the records as a table (logging.csv); metrics.until-step-<n>.csv: where a start went on without
tokens/                FFN experts by token at the end of training, as parquet
checkpoints/step-*/    written by moepp.checkpoint
wandb/  log/           W&B's files; console output, one file per rank
.lock                  held by the run that writes here
.importing             an import that is not finished, or was killed: nothing to train from yet

One user writes here; others may read, and continue from a checkpoint in a directory of their own.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp.config.compare import breaking_differences
from moepp.errors import RunError, WriteError
from moepp.io import files
from moepp.io.owners import permissions, require_safe_folder
from moepp.io.untrusted import MAX_JSON_BYTES, read_bytes, read_yaml
from moepp.io.write_errors import write_error
from moepp.runs.lock import RunLock

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"step-[0-9]{8,15}")
# What a start that failed early can leave behind; nothing of it makes a run.
_LEFTOVERS = {".lock", ".importing", "log", "wandb", "data-cache", "environment.json"}


@dataclass(frozen=True)
class RunDir:
    """Paths in a run directory; making one touches nothing. Use :meth:`claim` to write in it."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def routing_file(self) -> Path:
        return self.path / "routing.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def log(self) -> Path:
        return self.path / "log"

    @property
    def importing(self) -> Path:
        return self.path / ".importing"

    @classmethod
    def claim(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        resume: str = "auto",
        wait_seconds: float = 0.0,
        *,
        importing: bool = False,
        same_data: bool = False,
    ) -> RunClaim:
        """Create or reopen a run directory and hold it until :meth:`RunClaim.release`; rank 0 only.

        Args:
            path: run.dir; made absolute.
            config: the resolved configuration as plain nested dictionaries.
            environment: what :func:`moepp.runs.environment.describe_environment` returns.
            resume: "auto" continues a run whose model, data, seed, optimizer and global batch are the same; "never"
                wants a directory without a run; the path of a checkpoint wants either such a directory, or the one
                that holds the checkpoint.
            wait_seconds: how long a process that still uses the directory may take to end.
            importing: the directory is for weights that are about to be written: until
                :meth:`RunClaim.finish_import` nothing else than another import takes it.
            same_data: the data are known to be those of the run, so that they may lie elsewhere.

        Raises:
            RunError: not a directory, not writable, used by a running process, or holding another run or other files.
        """
        run_dir = cls(Path(os.path.abspath(os.path.expanduser(path))))
        config = json.loads(json.dumps(config))  # plain lists and numbers, as they come back from YAML
        try:
            _refuse_foreign_files(run_dir)
            files.make_folder(run_dir.path.parent)
            files.make_folder(run_dir.path, 0o755)
            require_safe_folder(run_dir.path)
            lock = RunLock.acquire(run_dir.path / ".lock", wait_seconds)
            try:
                _settle_import(run_dir, importing)
                _refuse_other_run(run_dir, config, resume, same_data)
                if importing:
                    files.write_whole(run_dir.importing, "")
                has_checkpoints = _has_checkpoints(run_dir)
                texts = _write_files(run_dir, config, environment, keep_metrics=has_checkpoints)
                found = os.stat(run_dir.path)
            except BaseException:
                lock.release()
                raise
        except OSError as error:
            raise RunError(_unwritable_message(run_dir.path, error)) from error
        return RunClaim(run_dir, has_checkpoints, lock, (found.st_dev, found.st_ino), texts)


def check_run_dir(path: str | Path, config: Mapping[str, Any], resume: str = "auto") -> Mapping[str, Any] | None:
    """Look, without writing, whether a run with this configuration could have the directory.

    Returns:
        The configuration of the run that the directory holds and that would be continued; ``None``: it holds none.

    Raises:
        RunError: as :meth:`RunDir.claim`, apart from what only writing shows.
    """
    run_dir = RunDir(Path(os.path.abspath(os.path.expanduser(path))))
    try:
        _refuse_blocked_path(run_dir.path)
        _refuse_foreign_files(run_dir)
        if os.path.lexists(run_dir.importing):
            _settle_import(run_dir, importing=False)  # refuses
        # Whether data that lie elsewhere are the same, only the run itself finds out.
        _refuse_other_run(run_dir, json.loads(json.dumps(config)), resume, same_data=True)
        return _read_config(run_dir) if _run_files(run_dir) and not _was_never_trained(run_dir) else None
    except OSError as error:
        raise RunError(_unwritable_message(run_dir.path, error)) from error


@dataclass(frozen=True)
class RunClaim:
    """A run directory that this process holds."""

    run_dir: RunDir
    has_checkpoints: bool  # of this run: there is something to resume from
    lock: RunLock
    identity: tuple[int, int]  # device and inode of the directory
    texts: Mapping[Path, tuple[str, int]]  # what was written at the start, and its permissions

    def check(self) -> None:
        """Make sure that the directory is still there and this run's; what it lacks of the start is written again.

        Raises:
            RunError: it was removed, renamed or replaced, or another process has it.
        """
        path = self.run_dir.path
        try:
            found = os.stat(path)
            if (found.st_dev, found.st_ino) != self.identity:
                raise FileNotFoundError
            self.lock.check()
            for file, (text, mode) in self.texts.items():
                if not os.path.lexists(file):
                    logger.warning("%s was removed while the run used it; it is written again", file)
                    files.write_whole(file, text, mode)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunError(
                f"run.dir={path} was removed, renamed or replaced while this run used it, so the run stops; start again"
                " in a new directory, with run.resume=CHECKPOINT where one is left"
            ) from error
        except OSError as error:  # a disk that is full, or a server that is away for the time being, ends no run
            logger.warning("cannot look after %s now: %s", path, error.strerror)

    def finish_import(self) -> None:
        """Mark the weights as complete: from now on the directory is a run like any other."""
        self.run_dir.importing.unlink()
        files.sync_folder(self.run_dir.path)

    def release(self) -> None:
        """Let another run have the directory."""
        self.lock.release()

    def __enter__(self) -> RunClaim:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()


def _refuse_blocked_path(path: Path) -> None:
    """Raise what making a folder at ``path``, or writing into it, would."""
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))


def _refuse_foreign_files(run_dir: RunDir) -> None:
    """Refuse a file, or a folder of somebody else's, before anything is written."""
    if not run_dir.path.is_dir():
        return  # mkdir says what is wrong, if anything
    names = {entry.name for entry in run_dir.path.iterdir() if not files.is_remains(entry.name)}
    if names - _LEFTOVERS and not _run_files(run_dir):
        example = sorted(names - _LEFTOVERS)[0]
        raise RunError(
            f"run.dir={run_dir.path} is not a run but holds other files ({example!r}); set run.dir to a new folder"
        )


def _settle_import(run_dir: RunDir, importing: bool) -> None:
    """Refuse to train in what an unfinished import left; another import clears it away and begins anew."""
    is_unfinished = os.path.lexists(run_dir.importing)
    if is_unfinished and not importing:
        raise RunError(
            f"run.dir={run_dir.path} holds an import that was not finished; repeat that `moepp import`, or choose "
            "another run.dir"
        )
    if is_unfinished:  # nothing was trained here: see claim()
        for folder in (run_dir.checkpoints, run_dir.path / "model"):
            if os.path.lexists(folder) and not folder.is_symlink():
                shutil.rmtree(folder)
        for file in (run_dir.metrics_file, run_dir.config_file, run_dir.environment_file):
            file.unlink(missing_ok=True)


def _refuse_other_run(run_dir: RunDir, config: Mapping[str, Any], resume: str, same_data: bool) -> None:
    if not _run_files(run_dir) or _was_never_trained(run_dir):
        return
    if resume == "never":
        raise RunError(
            f"run.dir={run_dir.path} already holds a run and run.resume=never; "
            "choose another run.name or run.dir, or continue it with run.resume=auto"
        )
    if resume != "auto" and run_dir.checkpoints.resolve() not in Path(resume).expanduser().resolve().parents:
        raise RunError(
            f"run.dir={run_dir.path} already holds a run and run.resume={resume} is not one of its checkpoints; "
            "choose another run.name or run.dir"
        )
    old, untrained = _read_config(run_dir), _is_untrained(run_dir)
    differences = breaking_differences(old, config, untrained=untrained, same_data=same_data)
    if differences:
        raise RunError(
            f"run.dir={run_dir.path} already holds another run; choose another run.name or run.dir, or undo:\n  "
            + "\n  ".join(differences)
        )


def _run_files(run_dir: RunDir) -> list[Path]:
    return [p for p in (run_dir.config_file, run_dir.metrics_file, run_dir.checkpoints) if p.exists()]


def _was_never_trained(run_dir: RunDir) -> bool:
    """Return whether a start failed before its first record, so that another configuration may take over."""
    return (
        run_dir.environment_file.exists()
        and run_dir.metrics_file.exists()
        and run_dir.metrics_file.stat().st_size == 0
        and not _numbered(run_dir.metrics_file)
        and run_dir.checkpoints.is_dir()
        and not _saved(run_dir)
    )


def _is_untrained(run_dir: RunDir) -> bool:
    """Return whether these are imported weights without a step: a checkpoint at step 0 and no record."""
    has_records = run_dir.metrics_file.exists() and run_dir.metrics_file.stat().st_size > 0
    return _saved(run_dir) == ["step-00000000"] and not has_records


def _saved(run_dir: RunDir) -> list[str]:
    """Return the entries of checkpoints/ without the remains of an interrupted save."""
    names = os.listdir(run_dir.checkpoints) if run_dir.checkpoints.is_dir() else []
    return [name for name in names if not (name.startswith(".step-") and name.endswith(".tmp"))]


def _has_checkpoints(run_dir: RunDir) -> bool:
    return run_dir.checkpoints.is_dir() and any(
        _CHECKPOINT.fullmatch(entry.name) and entry.is_dir() for entry in run_dir.checkpoints.iterdir()
    )


def _read_config(run_dir: RunDir) -> dict[str, Any]:
    try:
        config = read_yaml(run_dir.config_file, RunError)
    except RunError:
        config = None
    if not isinstance(config, dict):
        raise RunError(
            f"run.dir={run_dir.path} holds a run without a readable config.yaml, so it cannot be continued; "
            "restore that file, or choose another run.name or run.dir"
        )
    return config


def _write_files(
    run_dir: RunDir, config: Mapping[str, Any], environment: Mapping[str, Any], keep_metrics: bool
) -> dict[Path, tuple[str, int]]:
    import yaml

    texts = {
        run_dir.environment_file: json.dumps(environment, indent=2) + "\n",
        run_dir.config_file: yaml.safe_dump(dict(config), sort_keys=False),
    }
    for path, text in texts.items():
        _write_keeping_previous(path, text)
    for folder in (run_dir.checkpoints, run_dir.log, run_dir.wandb):
        files.make_own_folder(folder)
    for file in (run_dir.metrics_file, run_dir.routing_file):
        if not keep_metrics and file.exists() and file.stat().st_size > 0:
            mode = permissions(file.stat())
            files.move(file, _next_numbered(file, "{name}.{n}"))
            files.open_append(file, mode).close()
    files.open_append(run_dir.metrics_file).close()
    return {path: (text, permissions(path.stat())) for path, text in texts.items()}


def _write_keeping_previous(path: Path, text: str) -> None:
    """Write ``path`` in one go; a different previous version becomes ``<stem>.<n><suffix>``."""
    if path.exists() and (previous := read_bytes(path, MAX_JSON_BYTES, RunError, "remove it")) != text.encode():
        files.write_whole(_next_numbered(path, "{stem}.{n}{suffix}"), previous, permissions(path.stat()))
    files.write_whole(path, text)


def _next_numbered(path: Path, pattern: str) -> Path:
    n = 1
    while True:
        candidate = path.with_name(pattern.format(name=path.name, stem=path.stem, suffix=path.suffix, n=n))
        if not os.path.lexists(candidate):
            return candidate
        n += 1


def _numbered(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.[0-9]*"))


def _unwritable_message(path: Path, error: OSError) -> str:
    if not isinstance(error, WriteError):
        error = write_error(error.errno or 0, error.filename or path, error.strerror)
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        blocker = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None)
        if blocker is not None:
            return f"run.dir={path} cannot be a folder because {blocker} is a file; set another run.dir or run.name"
    return f"run.dir={path} is not writable ({error.filename}: {error.strerror}); {error.remedy}"

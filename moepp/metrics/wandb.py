"""Weights & Biases: offline by default, tokens as x-axis."""

from __future__ import annotations

import configparser
import logging
import netrc
import os
import queue
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from moepp.config.schema import WandbConfig
from moepp.errors import ConfigError, RunError, WriteError
from moepp.io import files
from moepp.io.untrusted import read_part
from moepp.io.write_errors import user_name
from moepp.metrics.routing import RoutingSnapshot

logger = logging.getLogger(__name__)

_PUBLIC_SERVER = "https://api.wandb.ai"
_MAX_WAITING = 10_000  # records that W&B has not taken yet
_FINISH_SECONDS = {"offline": 30.0, "online": 600.0}  # to flush a file; to send what is left
_END_SECONDS = 10.0  # for the thread to notice that the service has ended
_RUN_ID = re.compile(r"[\w-]{1,128}")
_MAX_RUN_ID = 8192  # bytes of the file: an id and a path

Draw = Callable[[RoutingSnapshot], "Mapping[str, np.ndarray]"]
"""Makes images of what the routers did, by name: uint8 [height, width, 3]."""
Table = Sequence[Mapping[str, Any]]
"""Rows of the same columns, at least one."""
_MakeRow = Callable[[], dict[str, Any]]


def require_wandb_login(mode: str) -> None:
    """Check before training, without network and without importing wandb, that an online run can log in.

    Looks where wandb itself looks: ``WANDB_API_KEY``, ``WANDB_IDENTITY_TOKEN_FILE``, the netrc file, wandb's settings.

    Raises:
        ConfigError: ``mode`` is "online" and no key is stored for the server.
    """
    if mode != "online":
        return
    settings = _read_settings()
    server = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or _PUBLIC_SERVER
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.get("api_key"):
        return
    if _netrc_has_key(server):
        return
    raise ConfigError(
        f"logging.wandb.mode=online needs a W&B API key and none is stored for {server}; "
        "run `wandb login`, set WANDB_API_KEY, or use logging.wandb.mode=offline"
    )


def require_wandb_settings(mode: str) -> None:
    """Check before training that W&B takes what the process environment's ``WANDB_`` variables say.

    Raises:
        ConfigError: it refuses one.
    """
    if mode == "disabled":
        return
    import wandb

    try:
        wandb.Settings().update_from_env_vars(dict(os.environ))
    except ValueError as error:
        raise ConfigError(f"{_refused_setting(error)}; correct or unset it") from error


def _refused_setting(error: ValueError) -> str:
    """Say in one line which variable W&B refuses; pydantic's errors list what is wrong with each field."""
    details: Any = error.errors()[0] if hasattr(error, "errors") else {}  # pyright: ignore[reportAttributeAccessIssue]
    if not details.get("loc"):
        return f"W&B refuses a WANDB_ variable of the environment: {_in_one_line(error)}"
    name = f"WANDB_{'_'.join(map(str, details['loc'])).upper()}"
    variable = name if name in os.environ else f"the setting {details['loc'][0]} of a WANDB_ variable"
    return f"{variable}={details['input']} in the environment is nothing that W&B takes: {details['msg']}"


class WandbSink:
    """Logs every record to one W&B run whose files lie in ``<run_dir>/wandb``.

    W&B works in a thread of its own: whatever its service does, dies or hangs, training goes on and ends well, for
    metrics.jsonl has every record. A failure is said once.
    """

    def __init__(
        self, run_dir: Path, cfg: WandbConfig, name: str, run_config: Mapping[str, Any], is_resumed: bool
    ) -> None:
        """Start the W&B run; a resumed one keeps its id, so that ``wandb sync`` joins the parts.

        Raises:
            ConfigError: online without a key, or W&B does not start.
            RunError: ``<run_dir>/wandb`` cannot be written to.
        """
        require_wandb_login(cfg.mode)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # offline means offline: no crash reports either
        import wandb

        self._wandb = wandb
        self._finish_seconds = _FINISH_SECONDS[cfg.mode]
        self.draw: Draw | None = None
        self.step_offset: int | None = 0  # global batches left out by rewinds; None: W&B counts by itself
        try:
            run_id = _run_id(run_dir / "wandb" / "run-id", is_resumed)
        except WriteError as error:
            raise RunError(str(error)) from error
        try:
            self._run = wandb.init(
                project=cfg.project,
                entity=cfg.entity,
                group=cfg.group,
                tags=list(cfg.tags) or None,
                notes=cfg.notes,
                name=name,
                id=run_id,
                dir=run_dir,
                config=dict(run_config),
                mode="online" if cfg.mode == "online" else "offline",
                # Offline runs are joined by their id when they are synced; wandb warns about resume there.
                resume="allow" if is_resumed and cfg.mode == "online" else None,
                settings=wandb.Settings(**_settings(cfg)),
            )
            self._run.define_metric("tokens")
            self._run.define_metric("*", step_metric="tokens")
        except Exception as error:
            raise ConfigError(
                f"W&B does not start with logging.wandb.mode={cfg.mode}: {_in_one_line(error)}; correct logging.wandb, "
                "or train without W&B: logging.wandb.mode=disabled"
            ) from error
        self._rows: queue.SimpleQueue[tuple[_MakeRow, int, int | None] | None] = queue.SimpleQueue()
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        return self._run.id

    def log(self, record: Mapping[str, float], step: int, tokens: int) -> None:
        """Hand over one record.

        W&B's own step is the run's step plus the offset, the number of global batches: so it increases also after a
        rewind, and the parts of a run that was resumed are disjoint but for steps that are computed again.
        """
        row = {"step": step, "tokens": tokens, **record}
        self._put(lambda: row, step)

    def log_routing(self, snapshot: RoutingSnapshot) -> None:
        """Hand over a snapshot, whose images are made in W&B's thread."""
        if self.draw is not None:
            self._put(lambda: self._images(snapshot), snapshot.step)

    def log_tables(self, tables: Mapping[str, Table], step: int, tokens: int) -> None:
        """Hand over tables by name, which are made in W&B's thread."""
        self._put(lambda: {"step": step, "tokens": tokens} | self._tables(tables), step)

    def _put(self, make: _MakeRow, step: int) -> None:
        if self._has_failed:
            return
        if self._rows.qsize() >= _MAX_WAITING:
            self._fail(f"at step {step}, because it does not take records any more")
            return
        self._rows.put((make, step, None if self.step_offset is None else step + self.step_offset))

    def _images(self, snapshot: RoutingSnapshot) -> dict[str, Any]:
        assert self.draw is not None
        images = {name: self._wandb.Image(image) for name, image in self.draw(snapshot).items()}
        return {"step": snapshot.step, "tokens": snapshot.tokens, **images}

    def _tables(self, tables: Mapping[str, Table]) -> dict[str, Any]:
        columns: dict[str, list[Any]] = {name: list(rows[0]) for name, rows in tables.items()}
        return {
            name: self._wandb.Table(columns[name], [[row[column] for column in columns[name]] for row in rows])
            for name, rows in tables.items()
        }

    def close(self) -> None:
        """Finish the run and wait until its file is complete, but not for ever."""
        self._rows.put(None)
        self._thread.join(self._finish_seconds)
        if not self._thread.is_alive():
            return
        self._fail(f"to finish within {self._finish_seconds:g} s and is ended; `wandb sync` sends what it has written")
        self._end_service()
        self._thread.join(_END_SECONDS)

    def _work(self) -> None:
        """Log until None comes, then finish: the thread's work."""
        while (item := self._rows.get()) is not None:
            make, step, own_step = item
            if self._has_failed:
                continue
            try:
                self._run.log(make(), step=own_step)
            except Exception as error:
                self._fail(f"at step {step}: {_in_one_line(error)}")
        # finish() alone returns before the file is flushed; teardown() also takes back what wandb does at exit.
        for end in (self._run.finish, self._wandb.teardown):
            try:
                end()
            except Exception as error:
                self._fail(f"to finish: {_in_one_line(error)}")

    def _fail(self, what: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            logger.warning("W&B failed %s; it gets no more records (metrics.jsonl does)", what)

    def _end_service(self) -> None:
        """Kill the service process, whose silence would also hold up the end of this one."""
        try:
            setup: Any = self._wandb.setup()
            service = setup._connection._proc._process  # there is no public way
            service.kill()
        except Exception as error:
            logger.warning("its service process could not be ended: %s", _in_one_line(error))


def _settings(cfg: WandbConfig) -> dict[str, Any]:
    """Return W&B's settings: its files say nothing about this machine or checkout unless ``git`` asks for it."""
    settings = {"silent": True, "console": "off", "disable_code": True}  # log/ holds the console output already
    if not cfg.git:
        settings |= {"disable_git": True, "x_disable_meta": True, "host": "not-recorded"}
    return settings


def why_not_own(run_dir: Path) -> str | None:
    """Return why this user may not add to the W&B run of a run directory; ``None``: they may.

    It is where this user trained, in this very place: a copy that came from elsewhere names a run of somebody else.
    """
    path = run_dir / "wandb" / "run-id"
    uid = path.lstat().st_uid
    if uid != os.geteuid():
        return f"it belongs to {user_name(uid)}"
    if _read_run_id(path)[1] != os.path.realpath(run_dir):
        return "it was trained in another place"
    return None


def _run_id(path: Path, is_resumed: bool) -> str:
    """Return the id of the W&B run, stored with the run directory it was made for."""
    run_dir = os.path.realpath(path.parents[1])
    run_id = None
    if is_resumed and path.is_file():
        run_id, place = _read_run_id(path)
        if run_id is None:
            logger.warning("%s holds no id of a W&B run: a new W&B run begins", path)
        elif place == run_dir:
            return run_id
    run_id = run_id or secrets.token_hex(4)
    files.make_own_folder(path.parent)
    files.write_whole(path, f"{run_id}\n{run_dir}\n")
    return run_id


def _read_run_id(path: Path) -> tuple[str | None, str | None]:
    """Return the id and run directory; None for what is missing."""
    first, _, rest = read_part(path, _MAX_RUN_ID).decode("utf-8", "replace").partition("\n")
    return first.strip() if _RUN_ID.fullmatch(first.strip()) else None, rest.removesuffix("\n") or None


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _read_settings() -> dict[str, str]:
    """Read wandb's own settings: the user's file, then the working directory's, which wins."""
    user_dir = os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([os.path.join(user_dir, "settings"), os.path.join("wandb", "settings")], encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return {}
    return dict(parser["default"]) if parser.has_section("default") else {}


def _netrc_has_key(server: str) -> bool:
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for candidate in candidates:
        path = os.path.expanduser(candidate) if candidate else ""
        if path and os.path.exists(path):
            try:
                login = netrc.netrc(path).authenticators(urlsplit(server).netloc)
            except (netrc.NetrcParseError, OSError):
                return False
            return bool(login and login[2])
    return False

"""Weights & Biases: offline by default, tokens as x-axis."""

from __future__ import annotations

import configparser
import logging
import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moepp.config.schema import WandbConfig
from moepp.errors import ConfigError

logger = logging.getLogger(__name__)

_PUBLIC_SERVER = "https://api.wandb.ai"


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


class WandbSink:
    """Logs every record to one W&B run whose files lie in ``<run_dir>/wandb``."""

    def __init__(
        self, run_dir: Path, cfg: WandbConfig, name: str, run_config: Mapping[str, Any], is_resumed: bool
    ) -> None:
        """Start the W&B run; a resumed one keeps its id, so that ``wandb sync`` joins the parts.

        Raises:
            ConfigError: online without a key, or W&B does not start.
        """
        require_wandb_login(cfg.mode)
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=cfg.project,
                name=name,
                id=_run_id(run_dir / "wandb" / "run-id", is_resumed),
                dir=run_dir,
                config=dict(run_config),
                mode="online" if cfg.mode == "online" else "offline",
                # Offline runs are joined by their id when they are synced; wandb warns about resume there.
                resume="allow" if is_resumed and cfg.mode == "online" else None,
                # log/ holds the console output already.
                settings=wandb.Settings(silent=True, console="off", disable_code=True),
            )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"W&B does not start with logging.wandb.mode={cfg.mode}: {reason}; correct logging.wandb, "
                "or train without W&B: logging.wandb.mode=disabled"
            ) from error
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")
        self._has_failed = False

    @property
    def run_id(self) -> str:
        return self._run.id

    def log(self, record: Mapping[str, float], step: int, tokens: int) -> None:
        """Send one record. A failing W&B ends W&B, not the training: metrics.jsonl has every record."""
        if self._has_failed:
            return
        try:
            # No step=: after a restart wandb would drop the steps that it has seen, and tokens is the axis anyway.
            self._run.log({"step": step, "tokens": tokens, **record})
        except Exception as error:
            self._has_failed = True
            logger.warning("W&B failed at step %d and gets no more records (metrics.jsonl does): %s", step, error)

    def close(self) -> None:
        """Finish the run and wait until its file is complete."""
        self._run.finish()
        self._wandb.teardown()  # finish() alone returns before the file is flushed


def _run_id(path: Path, is_resumed: bool) -> str:
    if is_resumed and path.exists():
        return path.read_text(encoding="utf-8").strip()
    run_id = secrets.token_hex(4)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def _read_settings() -> dict[str, str]:
    """wandb's own settings: the user's file, then the working directory's, which wins."""
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

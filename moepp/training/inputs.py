"""What jobs of a sweep will need: what is missing is found before the first of them starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moepp.config import Config, to_dict
from moepp.data import Corpora, check_data
from moepp.errors import CheckpointError, MoeppError


class InputChecks:
    """Checks of sinks, benchmarks, data, initial weights and checkpoints, each made once for all jobs that share them.

    They are those of the jobs themselves, apart from the content of tensors. Nothing is imported that no job needs.
    """

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def check(self, cfg: Config, is_new: bool) -> None:
        """Refuse a job that lacks what it needs.

        Args:
            cfg: of the job, validated.
            is_new: it has no checkpoint of its own, and so begins with ``init.path``.

        Raises:
            ConfigError, DataError, CheckpointError: as the job would.
        """
        logging = [cfg.logging.wandb.mode, cfg.logging.tensorboard]
        self._once(["sinks", *logging], lambda: _check_sinks(cfg))
        if cfg.eval.tasks:
            self._once(["tasks", *cfg.eval.tasks, cfg.eval.data], lambda: _check_tasks(cfg))
        corpora = self._corpora(cfg)
        if cfg.run.resume not in ("auto", "never"):
            _check_checkpoint(cfg, corpora)
        elif is_new and cfg.init.path is not None:
            from moepp.training.build import check_initial_weights

            check_initial_weights(cfg)

    def _corpora(self, cfg: Config) -> Corpora:
        used = [
            to_dict(cfg.data),
            cfg.model.vocab_size,
            cfg.train.eval_batches,
            cfg.train.samples,
            bool(cfg.eval.tasks),
        ]
        return self._once(used, lambda: check_data(cfg))

    def _once(self, used: list[Any], check: Callable[[], Any]) -> Any:
        """Return what a check of these settings found, or raise its error, again where it was made before."""
        key = json.dumps(used)
        if key not in self._found:
            try:
                self._found[key] = check()
            except MoeppError as error:
                self._found[key] = error
        found = self._found[key]
        if isinstance(found, MoeppError):
            raise found
        return found


def _check_sinks(cfg: Config) -> None:
    if cfg.logging.wandb.mode == "disabled" and not cfg.logging.tensorboard:
        return
    from moepp.metrics.sinks import require_sinks  # imports torch

    require_sinks(cfg.logging)


def _check_tasks(cfg: Config) -> None:
    from moepp.evaluation.names import harness_tasks_folder

    harness_tasks_folder()  # is it installed?
    from moepp.evaluation.data import open_source
    from moepp.evaluation.tasks import load_benchmarks

    load_benchmarks(cfg.eval.tasks, open_source(cfg.eval.data))


def _check_checkpoint(cfg: Config, corpora: Corpora) -> None:
    """Refuse ``run.resume`` if it is no checkpoint, or of other data; its files are verified by the job."""
    from moepp.checkpoint import continues_same_data, read_info

    try:
        read_info(Path(cfg.run.resume).expanduser())
    except CheckpointError as error:
        raise CheckpointError(f"run.resume={cfg.run.resume}: {error}") from error
    continues_same_data(cfg, Path(cfg.run.path, "checkpoints"), corpora.differences)

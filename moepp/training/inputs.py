"""The files that jobs of a sweep will read: what is missing is found before the first of them starts."""

from __future__ import annotations

import json
from pathlib import Path

from moepp.config import Config, to_dict
from moepp.data import Corpora, check_data
from moepp.errors import CheckpointError, MoeppError


class InputChecks:
    """Checks of data, initial weights and checkpoints, each made once for all jobs that share them.

    They are those of the jobs themselves, apart from the content of tensors. Nothing is imported that a process without
    training can do without.
    """

    def __init__(self) -> None:
        self._found: dict[str, Corpora | MoeppError] = {}

    def check(self, cfg: Config, is_new: bool) -> None:
        """Refuse a job whose files are not what it needs.

        Args:
            cfg: of the job, validated.
            is_new: it has no checkpoint of its own, and so begins with ``init.path``.

        Raises:
            DataError, CheckpointError: as the job would.
        """
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
        key = json.dumps(used)
        if key not in self._found:
            try:
                self._found[key] = check_data(cfg)
            except MoeppError as error:
                self._found[key] = error
        found = self._found[key]
        if isinstance(found, MoeppError):
            raise found
        return found


def _check_checkpoint(cfg: Config, corpora: Corpora) -> None:
    """Refuse ``run.resume`` if it is no checkpoint, or of other data; its files are verified by the job."""
    from moepp.checkpoint import continues_same_data, read_info

    try:
        read_info(Path(cfg.run.resume).expanduser())
    except CheckpointError as error:
        raise CheckpointError(f"run.resume={cfg.run.resume}: {error}") from error
    continues_same_data(cfg, Path(cfg.run.path, "checkpoints"), corpora.differences)

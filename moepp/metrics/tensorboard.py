"""TensorBoard: the same records as event files, tokens as x-axis."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from moepp.errors import ConfigError
from moepp.io import files

FOLDER = "tensorboard"


def require_tensorboard() -> None:
    """Check before training that event files can be written.

    Raises:
        ConfigError: the package is missing.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "logging.tensorboard=true, but the package tensorboard is not installed; pip install 'moepp[tensorboard]' "
            "or set it to false"
        )


class TensorBoardSink:
    """Writes every number of a record to ``<run_dir>/tensorboard``.

    Args:
        run_dir: run directory.
        tokens_per_step: of a global batch.
        start_step: optimizer steps done before this start; what an earlier start logged later than that is hidden,
            because it will be computed again.
    """

    def __init__(self, run_dir: Path, tokens_per_step: int, start_step: int = 0) -> None:
        require_tensorboard()
        self._folder, self._tokens_per_step = run_dir / FOLDER, tokens_per_step
        self._open(start_step)

    def _open(self, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        files.make_own_folder(self._folder)
        self._writer = SummaryWriter(str(self._folder), purge_step=start_step * self._tokens_per_step + 1)

    def rewind(self, step: int) -> None:
        """Hide the records of steps after ``step``, which will be written again."""
        self._writer.close()
        self._open(step)

    def log(self, record: Mapping[str, float], step: int, tokens: int) -> None:
        """Write the record's numbers at ``tokens``, and the step as ``progress/step``."""
        for name, value in record.items():
            self._writer.add_scalar(name, value, tokens)
        self._writer.add_scalar("progress/step", step, tokens)

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()

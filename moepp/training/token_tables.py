"""FFN experts by token over held-out batches, once training is done: parquet in the run directory, tables in W&B."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moepp.data import Tokenizer
from moepp.distributed import comm
from moepp.errors import MoeppError
from moepp.io import files

if TYPE_CHECKING:
    from moepp.analysis.token_tables import Rows
    from moepp.training.trainer import Trainer

logger = logging.getLogger(__name__)

MOST_TOKENS = 65536  # that are read, or a global batch where a pipeline needs a whole one
_MOST_TYPES = 1000  # token types in a table of W&B: those with the most and the fewest FFN experts


def write_token_tables(trainer: Trainer, run_path: Path) -> None:
    """Read held-out batches once more and write ``tokens/*.parquet``; every rank calls it.

    It costs no more than an evaluation. What cannot be written is said and ends nothing: the run is done and saved.
    """
    cfg, groups = trainer.cfg, trainer.groups
    if not cfg.logging.token_tables or not cfg.model.moe_layers:
        return
    if not cfg.train.eval_batches:
        logger.info("no tables of tokens are written: there are no held-out batches (train.eval_batches=0)")
        return
    from moepp.analysis.token_view import view_evaluation

    number = trainer.plan.accumulation_steps
    if groups.pp_size == 1:
        per_micro_batch = trainer.plan.tokens_per_step // number
        number = min(number * cfg.train.eval_batches, max(1, MOST_TOKENS // per_micro_batch))
    with trainer.evaluation():
        places = [divmod(index, trainer.plan.accumulation_steps) for index in range(number)]
        batches = [trainer.to_device(trainer.parts.data.eval_batch(*place)) for place in places]
        replica = groups.data_rank, groups.data_size
        view = view_evaluation(trainer.model, batches, trainer.runner.evaluate, replica, trainer.sum_over_ranks)
    if groups.rank == 0:
        from moepp.analysis.token_tables import FOLDER, token_tables

        path, end = cfg.data.tokenizer, trainer.vocabulary.eod_id
        decode = Tokenizer(path, eod_id=end).decode if path is not None else None
        tables = {name: rows for name, rows in token_tables({"validation": view}, decode).items() if rows}
        _write(tables, run_path / FOLDER)
        trainer.parts.sinks.log_tables(_for_wandb(tables), trainer.step, trainer.tokens)
    comm.on_first_rank(lambda: None)  # nobody goes on before


def _write(tables: Mapping[str, Rows], folder: Path) -> None:
    from moepp.analysis.parquet import write_parquet

    try:
        files.make_folder(folder)
        for name, rows in tables.items():
            write_parquet(folder / f"{name}.parquet", rows)
    except MoeppError as error:
        logger.warning("the tables of tokens are not written: %s; moepp analyze tokens writes such tables too", error)


def _for_wandb(tables: Mapping[str, Rows]) -> dict[str, Rows]:
    """Return the tables with plain cells, and no more types than one reads."""
    found = {}
    for name, rows in tables.items():
        half = _MOST_TYPES // 2
        rows = rows if len(rows) <= _MOST_TYPES else [*rows[:half], *rows[-half:]]
        found[f"tokens/{name}"] = [{column: _cell(value) for column, value in row.items()} for row in rows]
    return found


def _cell(value: Any) -> Any:
    return " | ".join(value) if isinstance(value, list) else value

"""FFN experts by token over held-out batches, once training is done: parquet in the run directory, tables in W&B."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moepp.data import Tokenizer
from moepp.distributed import comm
from moepp.errors import MoeppError
from moepp.io import files

if TYPE_CHECKING:
    from moepp.analysis.token_view import Batch, TokenView
    from moepp.training.trainer import Trainer

logger = logging.getLogger(__name__)

Tables = Mapping[str, list[dict[str, Any]]]
"""Rows by the name of their table."""
MOST_TOKENS = 65536  # that are read, in whole global batches, at least one of each set
_MOST_TYPES = 1000  # token types in a table of W&B: those with the most and the fewest FFN experts


def write_token_tables(trainer: Trainer, run_path: Path) -> None:
    """Read held-out batches once more and write ``tokens/*.parquet``; every rank calls it.

    It costs no more than an evaluation. What cannot be written is said and ends nothing: the run is done and saved.
    """
    cfg = trainer.cfg
    if not cfg.logging.token_tables or not cfg.model.moe_layers:
        return
    if not cfg.train.eval_batches:
        logger.info("no tables of tokens are written: there are no held-out batches (train.eval_batches=0)")
        return
    from moepp.analysis import token_tables
    from moepp.analysis.runs import SPLIT_NAME

    sets = trainer.validation_sets
    views = {name or SPLIT_NAME: view_tokens(trainer, name, MOST_TOKENS // len(sets)) for name in sets}
    comm.on_first_rank(lambda: _write_and_log(trainer, views, run_path / token_tables.FOLDER))


def view_tokens(trainer: Trainer, name: str | None = None, most: int = MOST_TOKENS) -> TokenView:
    """Read held-out batches and return what their tokens cost, the same in every layout; collective.

    Args:
        trainer: of the run.
        name: of a set of ``data.validation``; None: the validation part of ``data.paths``.
        most: tokens, but at least a global batch.
    """
    from moepp.analysis.token_view import view_evaluation

    cfg, groups = trainer.cfg, trainer.groups
    plan, data = trainer.plan, trainer.parts.data
    number = max(1, min(cfg.train.eval_batches, most // plan.tokens_per_step))
    steps = range(plan.accumulation_steps)

    def evaluate(batches: Sequence[Batch]) -> None:
        for first in range(0, len(batches), len(steps)):  # a pipeline takes a global batch at a time
            trainer.runner.evaluate(batches[first : first + len(steps)])

    with trainer.evaluation():
        batches = [trainer.to_device(data.eval_batch(index, step, name)) for index in range(number) for step in steps]
        replica = groups.data_rank, groups.data_size
        return view_evaluation(trainer.model, batches, evaluate, replica, trainer.sum_over_ranks)


def _write_and_log(trainer: Trainer, views: Mapping[str, TokenView], folder: Path) -> None:
    from moepp.analysis.token_tables import token_tables

    path, end = trainer.cfg.data.tokenizer, trainer.vocabulary.eod_id
    spelling = Tokenizer(path, eod_id=end).spelling if path is not None else (None, None)
    tables = {name: rows for name, rows in token_tables(views, *spelling).items() if rows}
    _write(tables, folder)
    trainer.parts.sinks.log_tables(_for_wandb(tables), trainer.step, trainer.tokens)


def _write(tables: Tables, folder: Path) -> None:
    from moepp.analysis.parquet import write_parquet

    try:
        files.make_folder(folder)
        for name, rows in tables.items():
            write_parquet(folder / f"{name}.parquet", rows)
    except MoeppError as error:
        logger.warning("the tables of tokens are not written: %s; moepp analyze tokens writes such tables too", error)


def _for_wandb(tables: Tables) -> Tables:
    """Return the tables with plain cells, and no more types than one reads."""
    found = {}
    for name, rows in tables.items():
        half = _MOST_TYPES // 2
        rows = rows if len(rows) <= _MOST_TYPES else [*rows[:half], *rows[-half:]]
        found[f"tokens/{name}"] = [{column: _cell(value) for column, value in row.items()} for row in rows]
    return found


def _cell(value: Any) -> Any:
    return " | ".join(value) if isinstance(value, list) else value

"""FFN experts by token over held-out batches, once training is done: parquet in the run directory, tables in W&B."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
Source = str | np.ndarray | None
"""What is read: see :func:`view_tokens`."""
MOST_TOKENS = 65536  # that are read, in whole global batches, at least one of each set
_MOST_PATHS = 32  # of data.paths that are viewed by themselves
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

    sources = held_out_sources(trainer)
    views = {name: view_tokens(trainer, source, MOST_TOKENS // len(sources)) for name, source in sources.items()}
    comm.on_first_rank(lambda: _write_and_log(trainer, views, run_path / token_tables.FOLDER))


def held_out_sources(trainer: Trainer) -> dict[str, Source]:
    """Return what is viewed by itself, by its name: each set of ``data.validation``, and each of ``data.paths``.

    A path counts by its validation part, under its file's name where that tells it from others; one path alone is
    called "data.paths". Which are left out is logged.
    """
    from moepp.analysis.runs import SPLIT_NAME

    cfg, files = trainer.cfg, trainer.parts.corpora.files
    sets: dict[str, Source] = {name: name for name in cfg.data.validation}
    if not cfg.data.evaluates_split:
        return sets
    if len(files) == 1:
        return {SPLIT_NAME: None, **sets}
    names = _path_names([file.prefix for file in files], sets)
    paths, unusable = {}, []
    for name, file in zip(names, files, strict=True):
        tokens_T = file.tokens_of_split(cfg.data.split, "valid")[: MOST_TOKENS + trainer.plan.tokens_per_step]
        if len(tokens_T) <= cfg.data.seq_len or int(tokens_T.max()) >= cfg.model.vocab_size:
            unusable.append(name)
        elif len(paths) < _MOST_PATHS:
            paths[name] = tokens_T
        else:
            unusable.append(name)
    if unusable:
        logger.warning("the tables of tokens leave out of data.paths: %s", ", ".join(unusable))
    return {**paths, **sets} or {SPLIT_NAME: None}


def _path_names(prefixes: Sequence[str], taken: Collection[str]) -> list[str]:
    """Return the shortest names that tell paths from each other and from sets: of files, as given, or whole paths."""
    for names in ([Path(prefix).name for prefix in prefixes], list(prefixes)):
        if len({*names, *taken}) == len(set(prefixes)) + len(taken):
            return names
    return [str(Path(prefix).absolute()) for prefix in prefixes]  # no set has a slash in its name


def view_tokens(trainer: Trainer, source: Source = None, most: int = MOST_TOKENS) -> TokenView:
    """Read held-out batches and return what their tokens cost, the same in every layout; collective.

    Args:
        trainer: of the run.
        source: name of a set of ``data.validation``; tokens [T], which are read in whole sequences, from the first on
            and over again where they end; None: the validation part of ``data.paths``.
        most: tokens, but at least a global batch.
    """
    from moepp.analysis.token_view import view_evaluation

    cfg, groups = trainer.cfg, trainer.groups
    plan = trainer.plan
    batch_of = _reader(trainer, source)
    number = max(1, min(cfg.train.eval_batches, most // plan.tokens_per_step))
    steps = range(plan.accumulation_steps)

    def evaluate(batches: Sequence[Batch]) -> None:
        for first in range(0, len(batches), len(steps)):  # a pipeline takes a global batch at a time
            trainer.runner.evaluate(batches[first : first + len(steps)])

    with trainer.evaluator.mode():
        batches = [trainer.to_device(batch_of(index, step)) for index in range(number) for step in steps]
        replica = groups.data_rank, groups.data_size
        return view_evaluation(trainer.model, batches, evaluate, replica, trainer.sum_over_ranks)


def _reader(trainer: Trainer, source: Source) -> Callable[[int, int], Batch]:
    """Return what gives the micro-batch of this replica in a global batch, as the run's data do."""
    if source is None or isinstance(source, str):
        return lambda index, micro_step: trainer.parts.data.eval_batch(index, micro_step, source)
    import torch

    plan, length, size = trainer.plan, trainer.cfg.data.seq_len, trainer.cfg.train.global_batch_size
    count = (len(source) - 1) // length

    def read(index: int, micro_step: int) -> Batch:
        first = index * size + (micro_step * plan.data_size + trainer.groups.data_rank) * plan.micro_batch_size
        starts_B = (first + np.arange(plan.micro_batch_size)) % count * length
        tokens_BX = torch.from_numpy(source[starts_B[:, None] + np.arange(length + 1)].astype(np.int64))
        return tokens_BX[:, :-1].contiguous(), tokens_BX[:, 1:].contiguous()

    return read


def _write_and_log(trainer: Trainer, views: Mapping[str, TokenView], folder: Path) -> None:
    from moepp.analysis.token_tables import token_tables

    path, end = trainer.cfg.data.tokenizer, trainer.vocabulary.eod_id
    spelling = Tokenizer(path, eod_id=end).spelling if path is not None else (None, None)
    tables = {name: rows for name, rows in token_tables(views, *spelling).items() if rows}
    _write(tables, folder)
    trainer.parts.sinks.log_tables(_for_wandb(tables), trainer.step, trainer.tokens)


def _write(tables: Tables, folder: Path) -> None:
    from moepp.io.tables import write_parquet

    try:
        files.make_own_folder(folder)
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

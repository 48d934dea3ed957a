"""What is read for the tables of tokens when training ends: every path and every validation set by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from moepp.analysis.token_view import TokenView
from moepp.config import make_plan
from moepp.data.indexed import open_indexed
from moepp.training import token_tables
from moepp.training.token_tables import held_out_sources
from tests.data_files import make_config, write_indexed


def make_trainer(paths: list[str], data_rank: int = 0, replicas: int = 1, **data: Any) -> Any:
    """What a trainer tells of its data; documents of 9 tokens, of which the last half is for validation."""
    cfg = make_config(paths, data__split="50,50,0", data__seq_len=4, train__global_batch_size=4, **data)
    corpora = SimpleNamespace(files=[open_indexed(path) for path in paths])
    groups = SimpleNamespace(data_rank=data_rank)
    plan = make_plan(cfg, replicas)
    return SimpleNamespace(cfg=cfg, plan=plan, groups=groups, parts=SimpleNamespace(corpora=corpora))


def write(path: Path, start: int) -> str:
    """Write documents of 9 tokens each, ``start`` and after it."""
    return write_indexed(path, [list(range(start + 9 * n, start + 9 * n + 9)) for n in range(4)])


def test_each_path_is_read_by_itself_and_named_as_briefly_as_possible(tmp_path, monkeypatch):
    paths = [write(tmp_path / "a/wiki", 0), write(tmp_path / "a/books", 40)]
    sources = held_out_sources(make_trainer(paths))
    assert {name: part.tolist() for name, part in sources.items()} == {
        "wiki": list(range(18, 36)),
        "books": list(range(58, 76)),
    }
    same = [*paths, write(tmp_path / "b/wiki", 80)]
    sets = make_trainer(same, data__validation={"code": [paths[0]]})
    assert list(held_out_sources(sets)) == [*same, "code"]
    monkeypatch.chdir(tmp_path / "a")
    clash = make_trainer(["wiki", "books"], data__validation={"wiki": [paths[0]]})
    assert list(held_out_sources(clash)) == [*paths, "wiki"], "no set takes the place of a path"
    assert held_out_sources(make_trainer(paths[:1])) == {"data.paths": None}
    assert held_out_sources(make_trainer(paths[:1], data__validation={"code": [paths[0]]})) == {
        "data.paths": None,
        "code": "code",
    }
    none_held_out = make_trainer(paths, data__validation={"code": [paths[0]]})
    none_held_out.cfg = replace(none_held_out.cfg, data=replace(none_held_out.cfg.data, split="1,0,0"))
    assert held_out_sources(none_held_out) == {"code": "code"}


def test_paths_that_cannot_be_read_or_are_too_many_are_named(tmp_path, monkeypatch, caplog):
    paths = [write(tmp_path / f"p{n}", 0) for n in range(3)]
    beyond = write_indexed(tmp_path / "beyond", [[5] * 9, [5] * 9, [5] * 9, [60_000] * 9])
    short = write_indexed(tmp_path / "short", [[5] * 9, [5] * 3])
    monkeypatch.setattr(token_tables, "_MOST_PATHS", 2)
    assert list(held_out_sources(make_trainer([*paths, beyond, short]))) == ["p0", "p1"]
    assert "leave out of data.paths: p2, beyond, short" in caplog.text


def test_replicas_share_the_sequences_of_a_path(tmp_path):
    part_T = np.arange(18, 36, dtype=np.uint16)  # 4 sequences of 4 tokens
    found = []
    for rank in (0, 1):
        trainer = make_trainer([write(tmp_path / "a", 0)], rank, 2, train__micro_batch_size=1)
        batch_of = token_tables._reader(trainer, part_T)
        for micro_step in range(trainer.plan.accumulation_steps):
            inputs_BS, labels_BS = batch_of(0, micro_step)
            assert (labels_BS == inputs_BS + 1).all()
            found += inputs_BS[:, 0].tolist()
            again_BS, _ = batch_of(1, micro_step)
            assert again_BS.tolist() == inputs_BS.tolist(), "they start over"
    assert sorted(found) == [18, 22, 26, 30]


def test_the_table_of_a_run_has_every_path(tmp_path, monkeypatch):
    paths = [write(tmp_path / name, 0) for name in ("wiki", "books", "code")]
    read, logged = [], []

    def view(trainer: Any, source: Any, most: int) -> TokenView:
        read.append(most)
        return TokenView(np.zeros((1, 2), int), np.zeros((1, 2)), np.ones((1, 2)), {"ffn": np.array([len(read) / 4])})

    monkeypatch.setattr(token_tables, "view_tokens", view)
    trainer = make_trainer(paths)
    trainer.parts.sinks = SimpleNamespace(log_tables=lambda tables, step, tokens: logged.append(tables))
    trainer.vocabulary, trainer.step, trainer.tokens = SimpleNamespace(eod_id=None), 1, 2
    token_tables.write_token_tables(trainer, tmp_path)
    rows = pq.read_table(tmp_path / "tokens/kinds.parquet").to_pylist()
    assert [(row["source"], row["ffn"]) for row in rows] == [("wiki", 0.25), ("books", 0.5), ("code", 0.75)]
    assert logged[0]["tokens/kinds"] == rows, "in W&B too"
    assert read == [token_tables.MOST_TOKENS // 3] * 3, "they share the tokens that are read"

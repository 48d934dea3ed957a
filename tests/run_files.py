"""Run directories as training leaves them, for tests of what reads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moepp.analysis.token_tables import token_tables
from moepp.analysis.token_view import TokenView
from moepp.config import to_dict
from moepp.io.tables import write_parquet
from moepp.metrics.routing import RoutingSnapshot
from moepp.metrics.routing_file import RoutingSink
from tests.data_files import make_config


def make_run(
    folder: Path,
    name: str,
    *,
    tau: float = 0.75,
    seed: int = 0,
    shift: float = 0.0,
    ffn: float = 1.25,
    vanilla: bool = False,
    records: int = 4,
) -> Path:
    """Make one with 4 training records and 2 evaluations; of 40 steps of 100 tokens."""
    path = folder / name
    path.mkdir(parents=True)
    cfg = make_config(["data/demo"])
    moe = replace(cfg.model.moe, tau=tau, num_ffn_experts=8)
    if not vanilla:
        moe = replace(moe, num_constant_experts=2, num_copy_experts=1, num_zero_experts=1)
    cfg = replace(cfg, run=replace(cfg.run, name=name, seed=seed), model=replace(cfg.model, moe=moe))
    cfg = replace(cfg, train=replace(cfg.train, steps=40))
    (path / "config.yaml").write_text(yaml.safe_dump(to_dict(cfg)))
    lines = []
    for number in range(1, records + 1):
        lines.append({"step": number * 10, "tokens": number * 1000} | training_record(number, shift, ffn))
        if number % 2 == 0:
            lines.append({"step": number * 10, "tokens": number * 1000, "eval/loss": 8.25 - number + shift})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def change_config(path: Path, **values: Any) -> None:
    """Set keys in a run's config.yaml; ``__`` in a name stands for a dot."""
    tree = yaml.safe_load((path / "config.yaml").read_text())
    for name, value in values.items():
        *sections, key = name.split("__")
        section = tree
        for one in sections:
            section = section[one]
        section[key] = value
    (path / "config.yaml").write_text(yaml.safe_dump(tree))


def training_record(number: int, shift: float = 0.0, ffn: float = 1.25) -> dict[str, Any]:
    """Return the metrics of the n-th training record, from 1."""
    record: dict[str, Any] = {"train/loss": 8.0 - number + shift, "train/grad_norm": 1.0}
    record |= {"routing/ffn_per_token": ffn + 0.1 * number, "throughput/tokens_per_second": 100.0 * number}
    record |= {"comm/dispatch_bytes": 300.0, "comm/dispatch_bytes_vanilla": 400.0}
    record |= {"time/forward": 0.1, "time/backward": 0.3, "time/step": 0.5, "time/data": 0.0, "time/other": 0.1}
    record |= {"time/forward_max_over_mean": 1.5, "time/backward_max_over_mean": 1.1, "time/slowest_rank": number % 2}
    record |= {"memory/peak_allocated_bytes": 1e9 * number, "data/epoch": 0.1 * number}
    record |= {"norm/gradient/attention": 0.5 * number, "norm/weight/attention": 10.0 + number}
    for layer in (0, 1):
        shares = {"ffn": 0.5 + 0.1 * layer, "constant": 0.2, "copy": 0.2, "zero": 0.1 - 0.1 * layer}
        record |= {f"routing/layer_{layer}/share_{kind}": share for kind, share in shares.items()}
        record[f"routing/layer_{layer}/max_over_mean"] = 1.5 + layer
        record[f"routing/layer_{layer}/entropy"] = 2.0 - 0.25 * layer
        record[f"comm/layer_{layer}/dispatch_bytes"] = 100.0 + 100 * layer
        record[f"comm/layer_{layer}/dispatch_bytes_vanilla"] = 200.0
    return record


def write_routing(run: Path) -> None:
    """Add three snapshots of the routing of two layers."""
    draw = np.random.default_rng(0)
    sink = RoutingSink(run)
    for number in (1, 2, 3):
        share_LE = draw.dirichlet(np.ones(12), 2)
        kinds = {"ffn": 8, "constant": 2, "copy": 1, "zero": 1}
        gates = {name: draw.dirichlet(np.ones(20), 2) for name in ("first", "second", "first_without_residual")}
        sink.log_routing(RoutingSnapshot(number * 10, number * 1000, (0, 1), kinds, share_LE, {}, gates))
    sink.close()


def write_token_tables(run: Path) -> None:
    """Add tables of tokens of a source whose name is markup."""
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 40, (16, 32))
    shares = {"ffn": np.full(2, 0.6), "zero": np.full(2, 0.4)}
    view = TokenView(ids, draw.random((16, 32)), draw.integers(0, 3, (16, 32)) / 2, shares)
    (run / "tokens").mkdir()
    for name, rows in token_tables({"books & <b>code</b>": view}, lambda ids: " w".join(map(str, ids))).items():
        write_parquet(run / f"tokens/{name}.parquet", rows)

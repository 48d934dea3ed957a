"""The metrics of the small study as small files: ``python launch/study_collect.py [FOLDER]`` writes docs/study/*.csv.

FOLDER holds the runs of ``launch/study.py`` (default: runs/study), FOLDER-analysis what ``moepp analyze`` has written
about them. The losses by source need the corpus, data/mixed. ``launch/study_page.py`` makes the page from these files.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from study_page import FOLDER, Rows, mixture, read

EVALUATION_TOKENS = 32_768  # of each source's validation documents, or all that there are
LAST_RECORDS = 10  # of 10 steps each


def collect(folder: Path) -> None:
    """Write curves.csv, layers.csv, sources.csv and the tables of the analyses."""
    import pyarrow.parquet as pq

    from moepp.analysis.runs import find_runs

    runs = sorted(find_runs([str(folder)]).runs, key=lambda run: run.name)
    write("curves", [row for run in runs for row in _curve(run)])
    write("layers", [row for run in runs for row in _layers(run)])
    names = {run.name for run in runs}
    known = [row for row in read("sources") if row["run"] in names] if (FOLDER / "sources.csv").exists() else []
    for run in runs:
        known += _by_source(run, {(row["run"], str(row["step"])) for row in known})
        write("sources", sorted(known, key=lambda row: row["run"]))  # each time: a later call need not repeat it
    for name in ("long-context", "robustness", "communication"):
        table = folder.with_name(f"{folder.name}-analysis") / name / f"{name}.parquet"
        if table.is_file():
            write(
                name, [{key: _short(value) for key, value in row.items()} for row in pq.read_table(table).to_pylist()]
            )


def _curve(run: Any) -> Rows:
    """Return a row per evaluation; ``ffn_rows`` counts tokens times FFN experts of a layer since the start."""
    rows, ffn_rows, before, loads, ffn = [], 0.0, 0, [], []
    for record in run.records:
        if "routing/ffn_per_token" in record:
            ffn_rows += record["routing/ffn_per_token"] * (record["tokens"] - before)
            before = record["tokens"]
            layers = [value for key, value in record.items() if key.endswith("/max_over_mean") and "layer_" in key]
            loads.append(fmean(layers))
            ffn.append(record["routing/ffn_per_token"])
        if "eval/loss" in record:
            row = {"run": run.name, "step": record["step"], "tokens": record["tokens"]}
            row |= {"eval_loss": round(record["eval/loss"], 4), "ffn_rows": round(ffn_rows)}
            rows.append(row | {"ffn_per_token": round(fmean(ffn), 4), "max_over_mean": round(fmean(loads), 3)})
            loads, ffn = [], []
    return rows


def _layers(run: Any) -> Rows:
    """Return a row per layer: shares of the router's choices by kind and load, means of the last records."""
    rows = []
    for layer in run.layers("max_over_mean"):
        row = {"run": run.name, "step": run.steps, "layer": layer}
        for metric in ("share_ffn", "share_constant", "share_copy", "share_zero", "max_over_mean"):
            values = run.series(f"routing/layer_{layer}/{metric}").values[-LAST_RECORDS:]
            row[metric] = round(fmean(values), 4)
        rows.append(row)
    return rows


def _by_source(run: Any, known: set[tuple[str, str]]) -> Rows:
    """Return loss and routing of a finished run's last checkpoint on every source's documents; nothing if known."""
    import numpy as np

    from moepp.analysis.observe import observe
    from moepp.data.indexed import open_indexed
    from moepp.distributed.groups import joined, read_launch_environment
    from moepp.evaluation.load import build_model, find_model
    from moepp.runs.environment import command_facts

    if not run.checkpoints:
        return []
    found = find_model(str(run.path))
    cfg, step, rows = found.run_config, found.subject.step, []
    if cfg is None or cfg.data.weights is None or step != cfg.train.steps:
        return []  # trained on something else, or not to its end
    if (run.name, str(step)) in known:
        return []
    with joined(read_launch_environment(), 1, 600.0, command_facts(()), "cpu") as groups:
        model = build_model(found, groups)
        for prefix, weight in zip(cfg.data.paths, cfg.data.weights, strict=True):
            tokens_T = open_indexed(prefix).tokens_of_split(cfg.data.split, "valid")
            count, length = min(len(tokens_T) - 1, EVALUATION_TOKENS) // cfg.data.seq_len, cfg.data.seq_len
            tokens_NX = np.stack([tokens_T[i * length : (i + 1) * length + 1] for i in range(count)])
            seen = observe(model, tokens_NX.astype(np.int64))
            row = {"run": run.name, "step": step, "source": Path(prefix).name, "weight": weight}
            row |= {"tokens": count * length, "loss": round(float(seen.losses_NS.mean()), 4)}
            row |= {f"share_{kind}": round(float(seen.share(kind).mean()), 4) for kind in seen.cfg.expert_counts}
            rows.append(row | {"ffn_per_token": round(float(seen.ffn_NS.mean()), 4)})
    print(f"{run.name}: step {step}, loss {mixture(rows):.4f}", flush=True)
    return rows


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write(name: str, rows: Rows) -> None:
    """Write rows as a table in docs/study; columns in the order in which they first appear."""
    FOLDER.mkdir(exist_ok=True)
    with open(FOLDER / f"{name}.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    collect(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/study"))

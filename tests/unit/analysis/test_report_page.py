"""Pages of runs: numbers against hand-made records, safe markup, and what bad input says."""

from __future__ import annotations

import argparse
import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from moepp.analysis.charts import charts, frontier
from moepp.analysis.comparison import compare, group_seeds
from moepp.analysis.figures import draw_figure
from moepp.analysis.runs import find_runs, read_run
from moepp.cli import report as command
from moepp.config import to_dict
from moepp.errors import ConfigError, RunError
from moepp.model.accounting import flops_per_token
from tests.data_files import make_config


def make_run(
    folder: Path, name: str, *, tau: float = 0.75, seed: int = 0, shift: float = 0.0, ffn: float = 1.25
) -> Path:
    """A run directory as training leaves it, with 4 training records and 2 evaluations."""
    path = folder / name
    path.mkdir(parents=True)
    cfg = make_config(["data/demo"])
    moe = replace(cfg.model.moe, tau=tau)
    cfg = replace(cfg, run=replace(cfg.run, name=name, seed=seed), model=replace(cfg.model, moe=moe))
    (path / "config.yaml").write_text(yaml.safe_dump(to_dict(cfg)))
    lines = []
    for number in range(1, 5):
        record: dict[str, Any] = {"step": number * 10, "tokens": number * 1000, "train/loss": 8.0 - number + shift}
        record |= {"routing/ffn_per_token": ffn + 0.1 * number, "throughput/tokens_per_second": 100.0 * number}
        record |= {"comm/dispatch_bytes": 300.0, "comm/dispatch_bytes_vanilla": 400.0, "train/grad_norm": 1.0}
        for layer in (0, 1):
            shares = {"ffn": 0.5 + 0.1 * layer, "constant": 0.2, "copy": 0.2, "zero": 0.1 - 0.1 * layer}
            record |= {f"routing/layer_{layer}/share_{kind}": share for kind, share in shares.items()}
            record[f"routing/layer_{layer}/max_over_mean"] = 1.5 + layer
        lines.append(record)
        if number % 2 == 0:
            lines.append({"step": number * 10, "tokens": number * 1000, "eval/loss": 8.25 - number + shift})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def report(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(arguments)))


def test_operations_add_up_by_the_experts_that_each_interval_computed(tmp_path):
    run = read_run(make_run(tmp_path, "one"))
    assert run.config is not None
    wanted = sum(
        1000 * flops_per_token(run.config.model, run.config.data.seq_len, 1.25 + 0.1 * n).forward_backward
        for n in range(1, 5)
    )
    assert run.flops.last == pytest.approx(wanted, rel=1e-12)
    x, y = run.over_flops("eval/loss")
    assert y == [6.25, 4.25] and x[1] == pytest.approx(wanted) and x[0] == pytest.approx(run.flops.values[1])


def test_table_puts_the_best_first_and_names_only_what_differs(tmp_path):
    for name, tau, shift in (("worse", 0.25, 0.5), ("best", 0.75, 0.0), ("middle", 1.0, 0.25)):
        make_run(tmp_path, name, tau=tau, shift=shift)
    rows = compare(find_runs([str(tmp_path)]))
    assert [row["run"] for row in rows] == ["best", "middle", "worse"]
    assert [row["model.moe.tau"] for row in rows] == ["0.75", "1.0", "0.25"]
    assert set(rows[0]) - {"run", "model.moe.tau"} == {
        *("tokens", "flops", "train_loss", "eval_loss", "best_eval_loss", "ffn_per_token"),
        *("tokens_per_second", "bytes_per_step", "bytes_saved"),
    }
    first = rows[0]
    assert (first["tokens"], first["eval_loss"], first["train_loss"]) == (4000, 4.25, 4.0)
    assert (first["tokens_per_second"], first["bytes_per_step"], first["bytes_saved"]) == (250.0, 300.0, 0.25)
    assert [row["run"] for row in compare(find_runs([str(tmp_path)]), "model.moe.tau")] == ["worse", "best", "middle"]


def test_seeds_of_one_setting_become_a_mean_and_a_spread(tmp_path):
    for seed, shift in enumerate((0.0, 0.1, 0.5)):
        make_run(tmp_path, f"a{seed}", seed=seed, shift=shift)
    assert group_seeds(find_runs([str(tmp_path / "a0")])) == []
    make_run(tmp_path, "b", tau=0.5)
    [three, one] = group_seeds(find_runs([str(tmp_path)]))
    assert (three["seeds"], one["seeds"]) == (3, 1)
    assert three["eval_loss"] == pytest.approx(4.45) and three["eval_loss_spread"] == pytest.approx(0.0700**0.5)
    assert one["eval_loss_spread"] is None


def test_frontier_names_the_runs_that_nothing_beats(tmp_path):
    make_run(tmp_path, "cheap", ffn=0.5, shift=0.4)
    make_run(tmp_path, "good", ffn=1.0, shift=0.0)
    make_run(tmp_path, "beaten", ffn=1.5, shift=0.2)
    figure = frontier(find_runs([str(tmp_path)]))
    assert figure is not None
    assert "cheap to good: 0.400 nats" in figure.caption and "beaten" not in figure.caption


class Markup(HTMLParser):
    """Tags, ids and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_page_of_a_run_is_one_file_with_distinct_ids_and_nothing_from_outside(tmp_path, capsys):
    path = make_run(tmp_path, "one")
    assert report(str(path)) == 0
    page = (path / "report.html").read_text()
    markup = Markup(page)
    assert not {"script", "link", "iframe", "img"} & set(markup.tags)
    assert len(markup.ids) == len(set(markup.ids))
    assert all(a.startswith(("#", "data:")) for a in markup.addresses), "nothing is fetched"
    names = set(markup.ids)
    assert all(a[1:] in names for a in markup.addresses if a.startswith("#"))
    assert markup.tags.count("svg") == 9 == markup.tags.count("figcaption")
    assert {file.name for file in (path / "figures").iterdir()} >= {
        "loss-over-tokens.png",
        "kinds.png",
        "share-ffn.png",
    }
    assert "4.2500" in page and "25.0%" in page, "validation loss and traffic saved"
    assert f"page: {path}/report.html" in capsys.readouterr().out


def test_every_chart_has_labelled_axes_and_a_conclusion_and_always_the_same_bytes(tmp_path):
    run = read_run(make_run(tmp_path, "one"))
    for figure, again in zip(charts([run]), charts([run]), strict=True):
        assert figure.svg == again.svg, figure.name
        texts = re.findall(r"<text[^>]*>([^<]+)</text>", figure.svg)
        assert any(re.search("tokens|operations|bytes|share", text) for text in texts), figure.name
        assert figure.caption.endswith(".") and figure.rows and len(figure.png) > 1000


def test_colours_follow_the_page():
    figure = draw_figure("x", "T", "C.", lambda axes, palette: axes.plot([1, 2], color=palette.series(2)))
    assert "var(--series-3)" in figure.svg and "#0102" not in figure.svg


@pytest.mark.parametrize("evil", ["</style><script>alert(1)</script>\x1b[31m", '" onload="x'])
def test_text_of_a_run_is_never_markup(tmp_path, evil):
    path = make_run(tmp_path, "one")
    (path / "samples.json").write_text(json.dumps([{"prompt": evil, "continuation": "y"}]))
    tree = yaml.safe_load((path / "config.yaml").read_text())
    tree["run"]["name"] = evil
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert report(str(path)) == 0
    page = (path / "report.html").read_text()
    assert "<script" not in page and "\x1b" not in page and page.count("</style>") == 1 + page.count("<style type")
    assert ' onload="' not in page


def test_several_runs_give_a_page_a_table_and_exports(tmp_path, capsys):
    for seed in (0, 1):
        make_run(tmp_path / "runs", f"run{seed}", seed=seed, shift=0.5 * seed)
    assert report(str(tmp_path / "runs"), "--table", str(tmp_path / "t.parquet")) == 0
    folder = tmp_path / "runs/comparison"
    page = (folder / "report.html").read_text()
    assert "2 runs" in page and "sample standard deviation" in page
    rows = list(csv.DictReader((folder / "comparison.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["run0", "run1"] and float(rows[1]["eval_loss"]) == 4.75
    assert pq.read_table(tmp_path / "t.parquet").to_pylist()[0]["eval_loss"] == 4.25
    assert "run0" in capsys.readouterr().out
    assert report(str(tmp_path / "runs")) == 0, "its own folder is no run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/a", "--sort", "tokens"], "--sort orders several runs"),
        (["runs", "--sort", "speed"], "--sort=speed is no column; choose one of run, "),
        (["runs", "--table", "t.txt"], "ends in .txt; end it in .csv or .parquet"),
        (["runs", "--unigram-entropy", "3"], "--unigram-entropy is drawn for one run"),
        (["empty"], "holds no metrics.jsonl and no run"),
        (["missing", "runs/a"], "missing is not a directory"),
        (["runs/a", "--out", "other"], "was not written by moepp report; choose another --out"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, monkeypatch, arguments, message):
    for name in ("a", "b"):
        make_run(tmp_path / "runs", name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/report.html").write_text("<p>mine</p>")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, RunError)) as error:
        report(*arguments)
    assert message in str(error.value)
    assert (tmp_path / "other/report.html").read_text() == "<p>mine</p>"
    assert not (tmp_path / "runs/comparison").exists()


def test_a_run_without_a_readable_configuration_still_gets_its_curves(tmp_path, caplog):
    path = make_run(tmp_path, "one")
    (path / "config.yaml").write_text("model: [")
    assert report(str(path)) == 0
    page = (path / "report.html").read_text()
    assert "Loss over tokens" in page and "Loss over operations" not in page
    assert "no operations are counted" in caplog.text

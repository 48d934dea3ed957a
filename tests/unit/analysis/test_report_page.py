"""Pages of runs: numbers against hand-made records, safe markup, and what bad input says."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest
import yaml

from moepp.analysis import figures
from moepp.analysis.charts import curve_charts
from moepp.analysis.comparison import compare, group_seeds
from moepp.analysis.cost_charts import cost_charts
from moepp.analysis.curves import curve_of, group_runs
from moepp.analysis.differences import differences, frontier
from moepp.analysis.figures import Figure, compact
from moepp.analysis.routing_charts import routing_charts
from moepp.analysis.runs import find_runs, read_run
from moepp.cli import report as command
from moepp.cli.main import main
from moepp.errors import ConfigError, RunError
from moepp.model.accounting import activated_parameters, flops_per_token
from moepp.moe.router import LinearRouter
from moepp.registry import ROUTERS
from tests.run_files import change_config, make_run, write_routing, write_token_tables

DRAW_SVG = figures._svg


@pytest.fixture(autouse=True)
def no_drawings(monkeypatch):
    """They cost far more time than everything else here; tests of the drawings undo it."""
    monkeypatch.setattr(figures, "_png", lambda draw: b"png")
    monkeypatch.setattr(figures, "_svg", lambda *of: "<svg></svg>")


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
    x, y = run.over("eval/loss", "operations")
    assert y == [6.25, 4.25] and x[1] == pytest.approx(wanted) and x[0] == pytest.approx(run.flops.values[1])
    model = run.config.model
    per_expert = 3 * 2 * 3 * model.hidden_size * model.moe.ffn_hidden_size * len(model.moe_layers)
    assert run.expert_flops.last == pytest.approx(1000 * per_expert * (4 * 1.25 + 1.0), rel=1e-12)
    assert run.over("eval/loss", "expert operations")[0][1] == run.expert_flops.last


def test_table_puts_the_best_first_and_names_only_what_differs(tmp_path):
    for name, tau, shift in (("worse", 0.25, 0.5), ("best", 0.75, 0.0), ("middle", 1.0, 0.25)):
        make_run(tmp_path, name, tau=tau, shift=shift)
    rows = compare(find_runs([str(tmp_path)]).runs)
    assert [row["run"] for row in rows] == ["best", "middle", "worse"]
    assert [row["model.moe.tau"] for row in rows] == ["0.75", "1.0", "0.25"]
    assert set(rows[0]) - {"run", "model.moe.tau"} == {
        *("tokens", "flops", "expert_flops", "train_loss", "eval_loss", "best_eval_loss", "ffn_per_token"),
        *("tokens_per_second", "bytes_per_step", "bytes_saved"),
    }
    first = rows[0]
    assert (first["tokens"], first["eval_loss"], first["train_loss"]) == (4000, 4.25, 4.0)
    assert (first["tokens_per_second"], first["bytes_per_step"], first["bytes_saved"]) == (250.0, 300.0, 0.25)
    assert [row["run"] for row in compare(find_runs([str(tmp_path)]).runs, "model.moe.tau")] == [
        "worse",
        "best",
        "middle",
    ]


def test_seeds_of_one_setting_become_a_mean_and_a_spread(tmp_path):
    for seed, shift in enumerate((0.0, 0.1, 0.5)):
        make_run(tmp_path, f"a{seed}", seed=seed, shift=shift)
    assert group_seeds(find_runs([str(tmp_path / "a0")]).runs) == []
    make_run(tmp_path, "b", tau=0.5)
    [three, one] = group_seeds(find_runs([str(tmp_path)]).runs)
    assert (three["runs"], one["runs"], three["setting"]) == (3, 1, "a")
    assert three["eval_loss"] == pytest.approx(4.45) and three["eval_loss_spread"] == pytest.approx(0.0700**0.5)
    assert one["eval_loss_spread"] is None


def test_frontier_names_the_runs_that_nothing_beats(tmp_path):
    make_run(tmp_path, "cheap", ffn=0.5, shift=0.4, tau=0.25)
    make_run(tmp_path, "good", ffn=1.0, shift=0.0)
    make_run(tmp_path, "beaten", ffn=1.5, shift=0.2, tau=1.0)
    figure = frontier(find_runs([str(tmp_path)]).runs)
    assert figure is not None
    assert "cheap (tau=0.25) to good (tau=0.75): 0.400 nats" in figure.caption and "beaten" not in figure.caption
    assert "At 4 k tokens" in figure.caption


def test_settings_are_set_against_the_vanilla_twin_where_both_have_got(tmp_path):
    make_run(tmp_path, "twin-1", ffn=1.9, vanilla=True, seed=1)
    make_run(tmp_path, "twin-2", ffn=1.9, vanilla=True, seed=2, shift=0.2)
    make_run(tmp_path, "moepp-1", ffn=0.9, shift=0.5, seed=1)
    make_run(tmp_path, "moepp-2", ffn=0.9, shift=0.7, seed=2)
    make_run(tmp_path, "short", tau=0.5, shift=0.25, seed=1, records=2)
    rows = differences(find_runs([str(tmp_path)]).runs)
    assert [(row["setting"], row["against"], row["also_differs_in"]) for row in rows] == [
        ("moepp", "twin", None),
        ("short", "twin", None),
    ]
    [both, short] = rows
    assert both["loss_at_equal_tokens"] == pytest.approx(0.5)
    # Two seeds that are 0.2 apart on either side: sqrt(0.02 / 2 + 0.02 / 2)
    assert both["loss_at_equal_tokens_error"] == pytest.approx(0.02**0.5)
    assert short["loss_at_equal_tokens"] == pytest.approx(0.25 - 0.1) and short["loss_at_equal_tokens_error"] is None
    # At the 4600 expert units where MoE++ ends, the twin is between 2,000 tokens (4100 units) and 4,000 (8600).
    at = 6.35 - 2 * (4600 - 4100) / (8600 - 4100)
    assert both["loss_at_equal_expert_operations"] == pytest.approx(4.25 + 0.6 - at)
    assert both["ratio_expert_operations"] == pytest.approx(1.15 / 2.15)
    assert both["ratio_tokens_per_second"] == 1.0
    # The short one is done at 2,000 tokens, where the others' routing and throughput were its own but for ``ffn``.
    assert short["ratio_expert_operations"] == pytest.approx(1.4 / 2.05)
    assert short["ratio_tokens_per_second"] == 1.0 and short["ratio_bytes"] == 1.0


def test_costs_on_the_frontier_are_means_up_to_where_losses_are_compared(tmp_path):
    long = make_run(tmp_path, "long", tau=0.25, ffn=0.5)
    text = (long / "metrics.jsonl").read_text()
    (long / "metrics.jsonl").write_text(text.replace('"routing/ffn_per_token": 0.9', '"routing/ffn_per_token": 1.9'))
    short = make_run(tmp_path, "short-1", ffn=0.5, shift=0.5, records=3)
    begun = make_run(tmp_path, "short-2", ffn=1.9, seed=1, records=1)  # no part of the curve: not far enough
    for path in (long, short, begun):
        change_config(path, model__vocab_size=16)  # experts are much of the model
    lines = [line for line in (short / "metrics.jsonl").read_text().splitlines() if "eval/loss" not in line]
    lines += ['{"step": 25, "tokens": 2500, "eval/loss": 6.0}', '{"step": 5, "tokens": 500, "eval/loss": 8.0}']
    lines.sort(key=lambda line: json.loads(line)["step"])
    (short / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    runs = find_runs([str(tmp_path)]).runs
    figure, model = frontier(runs), runs[0].config.model
    assert figure is not None and "At 2.5 k tokens" in figure.caption
    ffn = (1000 * 0.6 + 1000 * 0.7 + 500 * 0.8) / 2500
    used = compact(activated_parameters(model, ffn, include_embedding=False))
    assert used != compact(activated_parameters(model, ffn + 0.02, include_embedding=False))
    operations = compact(flops_per_token(model, runs[0].config.data.seq_len, ffn).forward_backward)
    assert [row[1:3] for row in figure.rows] == [(used, operations)] * 2


def test_seeds_are_one_curve_with_a_band_as_far_as_all_of_them_have_got(tmp_path):
    make_run(tmp_path, "a-seed-1", seed=1)
    make_run(tmp_path, "a-seed-2", seed=2, shift=0.2, records=2)
    make_run(tmp_path, "b", tau=0.5)
    first, second = group_runs(find_runs([str(tmp_path)]).runs)
    found = curve_of(first, "train/loss")
    assert found is not None and found[0] == first
    curve = found[1]
    assert curve.label == "a (2 seeds)" and second.label == "b"
    assert list(curve.x) == [1000, 2000] and curve.y == pytest.approx([7.1, 6.1])
    assert curve.spread == pytest.approx([0.02**0.5] * 2)
    caption = curve_charts(find_runs([str(tmp_path)]).runs)[0].caption
    assert "At 2 k tokens, the furthest that all reach, b is lowest (6.250 nats)" in caption
    assert "bands one sample standard deviation" in caption


def test_what_is_not_finite_or_not_done_is_said_and_the_rest_is_drawn(tmp_path):
    path = make_run(tmp_path, "one", records=2)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines[0]["train/loss"] = None
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text + '{"step": 30, "tok')
    assert report(str(path)) == 0
    page = (path / "report.html").read_text()
    assert "train/loss is not finite in 1 of 3 records" in page and "Not at its end: step 20 of 40." in page
    for line in lines:  # nothing at all is finite
        line |= {name: None for name in line if name not in ("step", "tokens")}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report(str(path)) == 0
    assert "train/loss is not finite in 2 of 3 records" in (path / "report.html").read_text()


def test_the_newer_of_training_and_analysis_tells_of_tokens(tmp_path):
    path = make_run(tmp_path, "one")
    write_token_tables(path)
    assert report(str(path)) == 0
    page = (path / "report.html").read_text()
    assert "From tokens/types.parquet" in page and "are older" not in page
    shutil.copytree(path / "tokens", path / "analysis/tokens")
    for newer, older, when in (("analysis/tokens", "tokens", 1767323045), ("tokens", "analysis/tokens", 1767409445)):
        for file in (path / newer).iterdir():
            os.utime(file, (when, when))
        for file in (path / older).iterdir():
            os.utime(file, (when - 3600, when - 3600))
        assert report(str(path)) == 0
        page = (path / "report.html").read_text()
        assert f"From {newer}/types.parquet" in page and f"From {older}/" not in page
        said = f"those of {newer}/, of 2026-01-0{2 + (newer == 'tokens')} 03:04 UTC; those of {older}/ are older."
        assert said in page


def test_tables_of_tokens_and_the_routing_history_are_on_the_page_or_missed_with_a_word(tmp_path, caplog, monkeypatch):
    path = make_run(tmp_path, "one")
    write_routing(path)
    write_token_tables(path)
    with monkeypatch.context() as patch:
        patch.setattr(figures, "_svg", DRAW_SVG)
        assert report(str(path)) == 0
    page = (path / "report.html").read_text()
    for title in ("Choices by layer and expert", "Experts over the training", "Gate weights", "By loss of the next"):
        assert f"{title}" in page, title
    assert 'class="text-sample"' in page and "books &amp; &lt;b&gt;code" in page and "<b>code" not in page
    assert "From tokens/types.parquet" in page and "From routing.jsonl" in page
    (path / "tokens/kinds.parquet").unlink()
    assert report(str(path)) == 0
    page = (path / "report.html").read_text()
    assert "Missing, and not drawn: tokens/kinds.parquet." in page and "By loss of the next" in page
    (path / "tokens/losses.parquet").write_bytes(b"no table")
    (path / "routing.jsonl").write_text('oops\n{"step": 1, "tokens": 2}\noops\n')
    assert report(str(path)) == 0
    page = (path / "report.html").read_text()
    said = page.partition("The tables of tokens are left out: cannot read ")[2]
    assert said.partition(": ")[0].endswith("/tokens/losses.parquet")
    assert "no history of its routing is drawn" in caplog.text and "Loss over tokens" in page


def test_a_damaged_run_of_a_folder_is_left_out_with_a_word(tmp_path, caplog):
    for name in ("good", "bad", "new"):
        make_run(tmp_path / "runs", name)
    (tmp_path / "runs/bad/metrics.jsonl").write_text('oops\n{"step": 1, "tokens": 2}\n')
    (tmp_path / "runs/new/metrics.jsonl").unlink()
    assert report(str(tmp_path / "runs")) == 0
    page = (tmp_path / "runs/comparison/report.html").read_text()
    assert "bad is left out" in page and "new is left out" in page and "1 runs" not in page
    with pytest.raises(RunError, match="line 1 is not a JSON object"):
        report(str(tmp_path / "runs/good"), str(tmp_path / "runs/bad"))


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


def test_page_of_a_run_is_one_file_with_distinct_ids_and_nothing_from_outside(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    path = make_run(tmp_path, "one")
    assert report(str(path)) == 0
    page = (path / "report.html").read_text()
    markup = Markup(page)
    assert not {"script", "link", "iframe", "img"} & set(markup.tags)
    assert len(markup.ids) == len(set(markup.ids))
    assert all(a.startswith(("#", "data:")) for a in markup.addresses), "nothing is fetched"
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (path / "figures").iterdir())
    names = set(markup.ids)
    assert all(a[1:] in names for a in markup.addresses if a.startswith("#"))
    assert markup.tags.count("svg") == 16 == markup.tags.count("figcaption")
    assert {file.name for file in (path / "figures").iterdir()} >= {
        "loss-over-tokens.png",
        "kinds.png",
        "share-ffn.png",
    }
    assert "4.2500" in page and "25.0%" in page, "validation loss and traffic saved"
    assert f"page: {path}/report.html" in capsys.readouterr().out


def test_every_chart_has_labelled_axes_and_a_conclusion_and_always_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.undo()
    run = read_run(make_run(tmp_path, "one"))

    drawn = [*curve_charts([run]), *routing_charts(run), *cost_charts([run])]
    assert drawn[0].svg == curve_charts([run])[0].svg
    for figure in drawn:
        texts = re.findall(r"<text[^>]*>([^<]+)</text>", figure.svg)
        assert any(re.search("tokens|operations|bytes|share|milliseconds", text) for text in texts), figure.name
        assert figure.caption.endswith(".") and figure.rows
        assert re.search(r"\w/[\w<]", figure.source), "names the metrics that it draws"


def test_colours_follow_the_page(monkeypatch):
    monkeypatch.undo()
    figure = Figure("x", "T", "C.", lambda axes, palette: axes.plot([1, 2], color=palette.series(2)))
    assert "var(--series-3)" in figure.svg and "#0102" not in figure.svg


def test_text_of_a_run_is_never_markup(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(figures, "_png", lambda draw: b"png")
    evil = '</style><script>alert(1)</script>\x1b[31m " onload="x'
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


def test_a_run_without_a_readable_configuration_still_gets_its_curves(tmp_path, capsys):
    path = make_run(tmp_path, "one")
    (path / "config.yaml").write_text("model: [")
    assert report(str(path)) == 0
    page = (path / "report.html").read_text()
    assert "Loss over tokens" in page and "Loss over operations" not in page
    for place in (page, capsys.readouterr().out):
        assert "No operations are counted, for its configuration is not known: " in place and "config.yaml" in place


PLUGIN = """
from moepp.moe.router import LinearRouter
from moepp.registry import ROUTERS


@ROUTERS.register("page")
class PageRouter(LinearRouter):
    def flops_per_token(self):
        return 3.0
"""


def test_a_run_of_registered_parts_has_its_operations_with_their_module(tmp_path, monkeypatch, capsys):
    """Its vanilla twin is one, too."""
    (tmp_path / "page_parts.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ROUTERS, "_entries", dict(ROUTERS._entries))
    for name in ("moepp", "vanilla"):
        path = make_run(tmp_path / "runs", name, vanilla=name == "vanilla")
        change_config(path, model__moe__router="page", runtime__plugins=["page_parts"])
    runs, page = str(tmp_path / "runs"), tmp_path / "runs/comparison/report.html"
    assert main(["report", runs]) == main(["report", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.count("--plugin page_parts") == 3 and "frontier" not in page.read_text()
    for text in (page.read_text(), (path / "report.html").read_text()):
        assert "--plugin page_parts" in text and "Loss over operations" not in text
    assert main(["watch", str(path)]) == 0 and capsys.readouterr().err == ""
    plugin = ["--plugin", "page_parts"]
    assert main(["report", runs, *plugin]) == main(["report", str(path), *plugin]) == 0
    assert "--plugin" not in capsys.readouterr().out
    assert "frontier" in page.read_text() and "Against the vanilla twin" in page.read_text()
    assert "Loss over operations" in (path / "report.html").read_text()
    [row] = csv.DictReader((tmp_path / "runs/comparison/differences.csv").open())
    assert (row["setting"], row["against"]) == ("moepp", "vanilla") and row["ratio_operations"]


def test_a_registered_part_whose_operations_are_unknown_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ROUTERS, "_entries", dict(ROUTERS._entries))
    ROUTERS.register("silent")(type("Silent", (LinearRouter,), {"flops_per_token": lambda self: None}))
    path = make_run(tmp_path, "one")
    change_config(path, model__moe__router="silent")
    assert read_run(path).notes == ["No operations are counted: no flops_per_token() of model.moe.router=silent."]

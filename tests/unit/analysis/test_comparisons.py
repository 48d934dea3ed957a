"""Runs beside each other: named validation sets, what seeds allow to conclude, and what is left out with a word."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from moepp.analysis import figures
from moepp.analysis.charts import band, curve_charts, curve_figure
from moepp.analysis.comparison import compare, group_seeds
from moepp.analysis.cost_charts import cost_charts, most_uneven
from moepp.analysis.curves import Curve, curves_of, group_runs
from moepp.analysis.differences import frontier
from moepp.analysis.evidence import Estimate, chance, differ, undecided, verdict
from moepp.analysis.figures import distinct_counts
from moepp.analysis.model_pages import bar_figure, line_figure
from moepp.analysis.routing_charts import routing_charts, time_columns
from moepp.analysis.runs import find_runs, read_run
from moepp.analysis.token_pages import plain_label
from moepp.analysis.validation_charts import validation_charts
from moepp.analysis.watch import panel
from moepp.cli.main import main
from tests.run_files import make_run


@pytest.fixture(autouse=True)
def quick_png(monkeypatch):
    """PNGs cost as much time as everything else here."""
    monkeypatch.setattr(figures, "_png", lambda draw: b"png")


def add(path: Path, tokens: int, **values: float | None) -> None:
    """Add a record where its step belongs; ``__`` in a name stands for a slash."""
    record = {"step": tokens // 100, "tokens": tokens} | {name.replace("__", "/"): v for name, v in values.items()}
    records = [*(json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()), record]
    lines = [json.dumps(one) + "\n" for one in sorted(records, key=lambda one: one["step"])]
    (path / "metrics.jsonl").write_text("".join(lines))


def without(path: Path, metric: str) -> None:
    """Take a metric out of every record."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({k: v for k, v in one.items() if k != metric}) + "\n" for one in records)
    (path / "metrics.jsonl").write_text(text)


def charts(folder: Path) -> dict[str, str]:
    """Return the captions of all charts of several runs, by title."""
    runs = find_runs([str(folder)]).runs
    return {one.title: one.caption for one in [*curve_charts(runs), *validation_charts(runs), *cost_charts(runs)]}


def test_each_validation_set_has_its_columns_its_curve_and_its_order(tmp_path, capsys):
    for name, tau, wiki in (("a", 0.25, 3.5), ("b", 0.5, 3.25), ("c", 0.75, None)):
        path = make_run(tmp_path / "runs", name, tau=tau)
        if wiki is not None:
            add(path, 2000, eval__wiki__loss=wiki - 0.25)
            add(
                path,
                4000,
                eval__wiki__loss=wiki,
                eval__wiki__perplexity=30.0,
                eval__piqa__acc=0.5 + wiki / 100,
            )
    assert main(["report", str(tmp_path / "runs"), "--table", str(tmp_path / "t.parquet")]) == 0
    page = (tmp_path / "runs/comparison/report.html").read_text()
    assert "Loss on wiki" in page and "Left out: c (no eval/wiki/loss)." in page and "Benchmark piqa/acc" in page
    assert "loss on wiki, nats" in capsys.readouterr().out
    rows = {row["run"]: row for row in csv.DictReader((tmp_path / "runs/comparison/comparison.csv").open())}
    assert (rows["a"]["eval_loss/wiki"], rows["a"]["best_eval_loss/wiki"]) == ("3.5", "3.25")
    assert rows["c"]["eval_loss/wiki"] == "" and rows["b"]["eval/piqa/acc"] == "0.5325"
    assert {row["run"]: row["eval_loss/wiki"] for row in pq.read_table(tmp_path / "t.parquet").to_pylist()}["b"] == 3.25
    runs = find_runs([str(tmp_path / "runs")]).runs
    assert [row["run"] for row in compare(runs, "eval_loss/wiki")] == ["b", "a", "c"]
    assert [row["run"] for row in compare(runs, "eval/piqa/acc")] == ["a", "b", "c"]


def test_validation_sets_of_seeds_have_a_mean_and_a_spread(tmp_path):
    for seed, loss in enumerate((3.0, 3.2)):
        add(make_run(tmp_path, f"a{seed}", seed=seed), 4000, eval__wiki__loss=loss)
    [row] = group_seeds(find_runs([str(tmp_path)]).runs)
    assert row["eval_loss/wiki"] == pytest.approx(3.1) and row["eval_loss/wiki_spread"] == pytest.approx(0.02**0.5)


def test_names_of_sets_in_a_file_of_metrics_lead_to_no_other_place(tmp_path):
    for name in ("a", "b"):
        path = make_run(tmp_path / "runs", name, tau=0.5 if name == "b" else 0.75)
        add(path, 4000, **{"eval__../../../evil__loss": 3.0, 'eval__"><script>__loss': 3.0})
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "<script" not in (tmp_path / "out/report.html").read_text()
    assert not list(tmp_path.rglob("evil*")) and len(list((tmp_path / "out/figures").glob("loss-[12]-*.png"))) == 2


def test_a_difference_counts_beyond_the_larger_spread_and_two_standard_errors():
    a, b = Estimate("a", 4.0, 0.03, 2), Estimate("b", 4.1, 0.04, 2)
    assert chance(a, b) == pytest.approx(2 * (0.0009 / 2 + 0.0016 / 2) ** 0.5) and differ(a, b)
    assert chance(Estimate("a", 0, 0.03, 100), Estimate("b", 0, 0.04, 100)) == 0.04
    near = Estimate("b", 4.06, 0.04, 2)
    assert differ(a, near) is False and "no difference" in verdict(a, near)
    single = Estimate("c", 4.5)
    assert differ(a, single) is None and verdict(a, single) == "one seed of c: spread unknown"
    assert verdict(single, Estimate("d", 4.6)) == "one seed each: spread unknown"
    close = Estimate("c", 4.02)
    assert differ(a, close) is False and "no difference" in verdict(a, close)
    assert undecided(a, [near, b, single, close]) == ["b", "c"]


@pytest.mark.parametrize(
    ("distance", "text"),
    [(0.1, "no difference"), (2.0, "more than the seeds' spread explains")],
)
def test_captions_conclude_nothing_that_is_within_the_spread_of_seeds(tmp_path, distance, text):
    for seed in (1, 2):
        make_run(tmp_path, f"a-seed-{seed}", seed=seed, shift=0.2 * seed, ffn=0.5)
        make_run(tmp_path, f"b-seed-{seed}", seed=seed, shift=0.2 * seed - distance, tau=0.5, ffn=1.5)
    runs = find_runs([str(tmp_path)]).runs
    figure = frontier(runs)
    assert figure is not None
    for caption in (curve_charts(runs)[0].caption, figure.caption):
        assert text in caption and (text == "no difference" or "no difference" not in caption)


def test_a_single_seed_is_said_to_have_no_spread(tmp_path):
    make_run(tmp_path, "a", ffn=0.5)
    make_run(tmp_path, "b", tau=0.5, ffn=1.0, shift=-0.5)
    runs = find_runs([str(tmp_path)]).runs
    figure = frontier(runs)
    assert figure is not None and "one seed each: spread unknown" in figure.caption
    assert "one seed each: spread unknown" in curve_charts(runs)[0].caption


def test_seeds_that_end_at_different_operations_are_drawn_over_them(tmp_path):
    for seed in (1, 2):
        path = make_run(tmp_path, f"a-seed-{seed}", seed=seed, ffn=0.5 + seed)
        without(path, "eval/loss")
        add(path, 4000, eval__loss=4.0 + seed)
    make_run(tmp_path, "b", tau=0.5)
    runs = find_runs([str(tmp_path)]).runs
    for axis in ("operations", "expert operations"):
        [(_, curve), _] = curves_of(group_runs(runs), "eval/loss", axis).curves
        ends = [run.over("eval/loss", axis)[0][-1] for run in runs[:2]]
        assert ends[0] != ends[1] and list(curve.x) == [pytest.approx(sum(ends) / 2)] and curve.y == [5.5]
    assert {"Loss over tokens", "Loss over operations", "Loss over expert operations"} <= charts(tmp_path).keys()


def test_what_is_no_part_of_a_curve_is_named(tmp_path):
    make_run(tmp_path, "a-seed-1", seed=1)
    make_run(tmp_path, "a-seed-2", seed=2, records=3)
    make_run(tmp_path, "a-seed-3", seed=3, records=1)
    without(make_run(tmp_path, "a-seed-4", seed=4), "train/loss")
    drawn = curves_of(group_runs(find_runs([str(tmp_path)]).runs), "train/loss")
    [(_, curve)] = drawn.curves
    assert curve.label == "a (2 of 4 seeds)" and list(curve.x) == [1000, 2000, 3000]
    assert drawn.left_out == ["a-seed-3 (a seed that is only at 1 k tokens)", "a-seed-4 (no train/loss)"]
    assert drawn.cut == ["a is drawn to 3 k tokens, where a-seed-2 ends"]
    caption = charts(tmp_path)["Loss over tokens"]
    assert "Left out: a-seed-3 (no eval/loss). a is drawn to 2 k tokens, where a-seed-2 ends." in caption


def test_seeds_without_common_tokens_are_drawn_alone(tmp_path):
    for seed, tokens in ((1, (1000, 3000)), (2, (4000, 5000))):
        path = make_run(tmp_path, f"a-seed-{seed}", seed=seed)
        (path / "metrics.jsonl").write_text("")
        for one in tokens:
            add(path, one, train__loss=5.0, routing__ffn_per_token=1.0)
    drawn = curves_of(group_runs(find_runs([str(tmp_path)]).runs), "train/loss")
    assert [curve.label for _, curve in drawn.curves] == ["a-seed-1", "a-seed-2"]
    assert drawn.cut == ["The seeds of a have no tokens in common, so each is drawn alone"]


def test_a_run_that_has_begun_spoils_no_comparison_of_others(tmp_path):
    make_run(tmp_path, "a")
    make_run(tmp_path, "b", tau=0.5, shift=-0.5, ffn=1.5)
    without(make_run(tmp_path, "new", tau=1.0, records=1), "eval/loss")
    figure = frontier(find_runs([str(tmp_path)]).runs)
    assert figure is not None and "At 4 k tokens" in figure.caption and "0.500 nats" in figure.caption
    caption = charts(tmp_path)["Loss over operations"]
    assert "b is lowest" in caption and "Left out: new (no eval/loss)." in caption and caption != figure.caption
    without(tmp_path / "a", "eval/loss")
    caption = charts(tmp_path)["Loss over tokens"]
    assert "At 4 k tokens" in caption and "not half as far as the longest: new (1 k tokens)" in caption


def test_runs_without_the_numbers_of_a_cost_chart_are_named(tmp_path):
    make_run(tmp_path, "a")
    path = make_run(tmp_path, "b", tau=0.5)
    for metric in ("time/forward", "time/backward", "time/step", "time/data", "time/other"):
        without(path, metric)
    without(path, "comm/dispatch_bytes_vanilla")
    found = charts(tmp_path)
    assert "Left out, without time/<stage>: b." in found["Step time by stage"]
    assert "Left out, for they send no rows between ranks: b." in found["Expert-parallel traffic"]


def test_the_stage_in_which_most_time_is_lost_is_named_whatever_its_ratio(tmp_path):
    """A ratio says nothing of a stage that takes no time, nor of one in which the fastest rank waits longest."""
    path = make_run(tmp_path, "one")
    for metric, value in {"time/data": (1e-4, 9.0), "time/reduction": (0.5, 3.0)}.items():
        add(path, 4000, **{metric: value[0], f"{metric}_max_over_mean": value[1]})
    run = read_run(path)
    [figure] = [one for one in cost_charts([run]) if one.name == "stragglers"]
    assert "Most is lost in forward: its slowest rank takes 1.50 times the mean, 50 ms more per step" in figure.caption
    assert most_uneven(run, max) == ("forward", 1.5, pytest.approx(0.05))
    stream = io.StringIO()
    Console(file=stream, width=300).print(panel(run, width=300))
    assert "forward: slowest 1.50 times the mean" in stream.getvalue()
    for metric in ("time/forward", "time/backward", "time/data"):
        without(path, metric)
    assert most_uneven(read_run(path), max) == ("data", 9.0, 0.0)


def test_memory_of_the_host_is_drawn_and_that_of_an_accelerator_is_told(tmp_path, monkeypatch):
    path = make_run(tmp_path, "one")
    for tokens in (5000, 6000):
        add(path, tokens, memory__host_peak_bytes=9e9)
    [figure] = [one for one in cost_charts([read_run(path)]) if one.name == "memory"]
    assert "At most 4 GB (peak allocated)" in figure.caption and "host peak" in figure.svg
    without(path, "memory/peak_allocated_bytes")
    [figure] = [one for one in cost_charts([read_run(path)]) if one.name == "memory"]
    assert "At most 9 GB (host peak)" in figure.caption
    monkeypatch.setattr(figures, "_svg", lambda *of: "<svg></svg>")
    assert main(["report", str(path)]) == 0
    assert "<dt>peak memory of the host</dt><dd>9 GB</dd>" in (path / "report.html").read_text()


def test_the_unigram_entropy_is_a_line_on_the_losses_of_a_run(tmp_path, monkeypatch):
    path = make_run(tmp_path, "one")
    [chart, *_] = curve_charts([read_run(path)], 6.125)
    assert re.search("<text[^>]*>unigram entropy<", chart.svg), "it is in the legend"
    assert ("unigram entropy", "-", "6.125") in [tuple(row[:3]) for row in chart.rows]
    assert "unigram entropy" not in curve_charts([read_run(path)])[0].svg
    monkeypatch.setattr(figures, "_svg", lambda *of: "<svg></svg>")
    for options, folder in (([], path), (["--out", str(tmp_path / "out")], tmp_path / "out")):
        assert main(["report", str(path), "--unigram-entropy", "6.125", *options]) == 0
        charts = [part for part in (folder / "report.html").read_text().split("<h3>") if "unigram entropy" in part]
        assert [part.split("<")[0] for part in charts] == ["Loss over tokens", "Loss over operations"]
        assert all("The dashed line is the unigram entropy, 6.125 nats" in part for part in charts)


def test_the_band_of_a_long_run_encloses_its_seeds_and_keeps_the_page_small():
    draw = np.random.default_rng(0)
    x_P = np.cumsum(draw.integers(1, 9, 20_000)) * 100.0
    y_P, spread_P = 5 + 0.1 * draw.normal(size=len(x_P)), 0.05 + 0.05 * draw.random(len(x_P))
    spread_P[7_777], y_P[12_345] = 3.0, 9.0
    curve = Curve("a", x_P.tolist(), y_P.tolist(), spread_P.tolist(), 2)
    x, low, high = band(curve)
    assert len(x) <= 1000 and (x[0], x[-1]) == (x_P[0], x_P[-1]) and all(np.diff(x) >= 0)
    assert (np.interp(x_P, x, low) <= y_P - spread_P + 1e-9).all()
    assert (np.interp(x_P, x, high) >= y_P + spread_P - 1e-9).all()
    assert min(low) == min(y_P - spread_P) and max(high) == max(y_P + spread_P)
    width = (x_P[-1] - x_P[0]) / 500
    near = np.abs(x_P - x_P[7_777]) > 2 * width  # an outlier widens its own column alone
    assert np.interp(x_P[near], x, low).min() > 4.0
    assert len(curve_figure("a", "A", "C.", [curve], ("x", "y"), "s").svg) < 400_000
    short = Curve("b", [1.0, 2.0], [5.0, 6.0], [0.5, 0.25], 2)
    assert band(short) == ([1.0, 2.0], [4.5, 5.75], [5.5, 6.25])


def test_ticks_never_read_the_same():
    assert distinct_counts([1.0e6, 1.5e6, 2.0e6]) == ["1 M", "1.5 M", "2 M"]
    assert distinct_counts([8_191_000, 8_192_000, 8_193_000]) == ["8.191 M", "8.192 M", "8.193 M"]
    assert distinct_counts([1.0, 1.0]) == ["1", "1"]


def test_colours_of_settings_are_the_same_on_every_chart(tmp_path):
    without(make_run(tmp_path, "a"), "routing/ffn_per_token")
    make_run(tmp_path, "b", tau=0.5)
    groups = group_runs(find_runs([str(tmp_path)]).runs)
    assert [curve.number for _, curve in curves_of(groups, "routing/ffn_per_token").curves] == [1]
    assert [curve.number for _, curve in curves_of(groups, "train/loss").curves] == [0, 1]


def test_many_settings_leave_the_drawing_its_room(tmp_path):
    for number in range(20):
        make_run(tmp_path, f"a-setting-with-a-long-name-{number}", tau=0.04 * (number + 1), shift=0.01 * number)
    figure = curve_charts(find_runs([str(tmp_path)]).runs)[0]
    heights = [float(number) for number in figure.svg.split('viewBox="')[1].split('"')[0].split()]
    assert heights[3] > 350, "it grows with its legend"
    assert all(f"-{number}<" in figure.svg for number in range(20)), "every setting is named"


def test_heat_maps_begin_where_records_do(tmp_path):
    columns, start = time_columns([1000, 2000, 3000], 1.0)
    assert (columns, start) == ([0, 1, 2], 0)
    assert time_columns([5000, 6000], 1.0) == ([0, 1], 4000)
    assert time_columns([5000], 500.0) == ([0], 4500)
    columns, start = time_columns([5000, 6000, 7000, 12000], 1.0)
    assert (columns, start) == ([0, 1, 2, None, None, None, 3, 3], 4000), "what was not measured stays empty"
    assert len(time_columns(list(range(10, 10010, 10)), 1.0)[0]) == 200
    path = make_run(tmp_path, "late")
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join(line for line in lines if '"tokens": 1000,' not in line) + "\n")
    [figure] = [one for one in routing_charts(read_run(path)) if one.name == "entropy"]
    axes = Figure().subplots()
    figure.draw(axes, figures.Palette(placeholders=False))
    assert axes.images[0].get_extent()[:2] == [1000, 4000]


def test_names_reach_the_drawings_as_they_are(tmp_path):
    names = ("_a", "_b", r"a$\q$", "costs $1 & <b>$2")
    for number, name in enumerate(names):
        make_run(tmp_path, name, tau=0.25 * (number + 1), shift=0.1 * number, ffn=0.5 + 0.1 * number)
    runs = find_runs([str(tmp_path)]).runs
    lines = line_figure("x", "X", "C.", {name: ([1.0], [2.0]) for name in names}, ("x", "y"))
    bars = bar_figure("x", "X", "C.", [(plain_label(name), 1.0) for name in names], "l", "s", ((), ()))
    drawn = [frontier(runs), *curve_charts(runs), *cost_charts(runs), lines, bars]
    for figure in drawn:
        assert figure is not None
        texts = [html.unescape(text).strip() for text in re.findall(r"<text[^>]*>([^<]+)</text>", figure.svg)]
        told = [text.replace("\N{OPEN BOX}", " ").split(" (")[0] for text in texts]
        assert set(names) <= set(told), figure.name
        assert not any("\\$" in cell for row in figure.rows for cell in row), "nothing is escaped in a table"


def test_kinds_and_modules_reach_the_drawings_as_they_are(tmp_path):
    path = make_run(tmp_path, "one")
    lines = (path / "metrics.jsonl").read_text().replace("norm/weight/attention", "norm/weight/_x$\\\\q$")
    (path / "metrics.jsonl").write_text(lines.replace("norm/gradient/attention", "norm/weight/b"))
    [figure] = [one for one in cost_charts([read_run(path)]) if one.name == "weight-norms"]
    texts = [text.strip() for text in re.findall(r"<text[^>]*>([^<]+)</text>", figure.svg)]
    assert r"_x$\q$" in texts and not any("mathdefault" in text for text in texts)
    assert any(re.fullmatch(r"[0-9.e+-]+", text) for text in texts), "a logarithmic axis has numbers"

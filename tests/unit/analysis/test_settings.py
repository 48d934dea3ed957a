"""Which runs are seeds of one setting, what each is compared with, how they are named and ordered."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure as MplFigure

from moepp.analysis import figures
from moepp.analysis.charts import curve_charts
from moepp.analysis.comparison import compare, group_seeds, text_of
from moepp.analysis.curves import group_runs
from moepp.analysis.differences import differences, frontier
from moepp.analysis.losses import compared_loss
from moepp.analysis.report import comparison_notes
from moepp.analysis.runs import find_runs
from moepp.cli.main import main
from tests.run_files import change_config, make_run


@pytest.fixture(autouse=True)
def no_drawings(monkeypatch):
    """They cost more time than everything else here."""
    monkeypatch.setattr(figures, "_png", lambda draw: b"png")
    monkeypatch.setattr(figures, "_svg", lambda *of: "<svg></svg>")


def make_pair(folder: Path, ending: str, shift: float, difference: float, **config: object) -> None:
    """Make a vanilla run and one of MoE++ whose loss differs from its twin's."""
    for name in ("vanilla", "moepp"):
        is_vanilla = name == "vanilla"
        path = make_run(folder, f"{name}-{ending}", vanilla=is_vanilla, shift=shift + (0 if is_vanilla else difference))
        change_config(path, model__moe__gating_residual=not is_vanilla, **config)


def test_runs_that_differ_behind_the_sixtieth_letter_are_no_seeds_of_each_other(tmp_path):
    start = "/data/" + "a-long-folder-of-a-corpus/" * 4
    for seed, name in enumerate(("wiki", "wiki", "books")):
        path = make_run(tmp_path / "runs", f"{name}-{seed}", seed=seed)
        change_config(path, data__paths=[start + name])
    assert main(["report", str(tmp_path / "runs"), "--table", str(tmp_path / "t.csv")]) == 0
    groups = group_runs(find_runs([str(tmp_path / "runs")]).runs)
    assert sorted(len(group.runs) for group in groups) == [1, 2]
    for file in (tmp_path / "t.csv", tmp_path / "runs/comparison/seeds.csv"):
        cells = {row["data.paths"] for row in csv.DictReader(file.open())}
        assert cells == {f"['{start}{name}']" for name in ("wiki", "books")}, "files have the whole value"
    page = (tmp_path / "runs/comparison/report.html").read_text()
    assert f"{start}wiki" not in page.split("<h2>Each run")[0] and len(text_of("data.paths", start * 9)) == 40 - 1


def test_a_run_that_is_profiled_is_a_seed_like_any_other(tmp_path):
    make_run(tmp_path, "a-1", seed=1)
    change_config(make_run(tmp_path, "a-2", seed=2), profile__steps=[3])
    [group] = group_runs(find_runs([str(tmp_path)]).runs)
    assert len(group.runs) == 2


@pytest.mark.parametrize("key", ["runtime__kernels", "runtime__compile", "runtime__device", "parallel__expert"])
def test_runs_on_other_kernels_devices_or_layouts_are_no_seeds_of_each_other(tmp_path, key):
    """Their losses agree but for rounding, so that a spread of them would be none of seeds; their speeds differ."""
    values = {
        "runtime__kernels": ("torch", "cpu"),
        "runtime__compile": (False, True),
        "runtime__device": ("cpu", "cuda"),
    }
    for value in values.get(key, (1, 2)):
        change_config(make_run(tmp_path, f"a-{value}"), **{key: value})
    runs = find_runs([str(tmp_path)]).runs
    assert [len(group.runs) for group in group_runs(runs)] == [1, 1] and not group_seeds(runs)


def test_repetitions_of_one_seed_are_said_to_be_no_seeds(tmp_path):
    for name, seed in (("a-1", 1), ("a-2", 2), ("a-again", 2)):
        make_run(tmp_path, name, seed=seed)
    make_run(tmp_path, "b", seed=2, tau=0.5)
    notes = comparison_notes(find_runs([str(tmp_path)]).runs)
    assert notes == ["Of one seed, so that their spread is none of seeds: a-2, a-again."]


def test_each_setting_is_set_against_the_vanilla_run_that_differs_in_nothing_else(tmp_path):
    make_pair(tmp_path, "lr-1", 0.0, -0.25, optim__lr=0.001)
    make_pair(tmp_path, "lr-2", 1.0, 0.5, optim__lr=0.002)
    make_pair(tmp_path, "lr-2-beta", 2.0, 0.75, optim__lr=0.002, model__moe__balance_loss_weight=0.5)
    rows = differences(find_runs([str(tmp_path)]).runs)
    assert [(row["setting"], row["against"], row["also_differs_in"]) for row in rows] == [
        (f"moepp-{ending}", f"vanilla-{ending}", None) for ending in ("lr-1", "lr-2", "lr-2-beta")
    ]
    assert [row["loss_at_equal_tokens"] for row in rows] == pytest.approx([-0.25, 0.5, 0.75])


def test_a_setting_without_a_twin_is_set_against_the_nearest_and_the_page_says_in_what_it_differs(tmp_path):
    make_pair(tmp_path / "runs", "lr-1", 0.0, -0.25, optim__lr=0.001)
    change_config(make_run(tmp_path / "runs", "moepp-lr-3"), optim__lr=0.003, train__recompute=True)
    change_config(make_run(tmp_path / "runs", "vanilla-lr-4", vanilla=True), optim__lr=0.004)
    assert main(["report", str(tmp_path / "runs")]) == 0
    rows = {row["setting"]: row for row in csv.DictReader((tmp_path / "runs/comparison/differences.csv").open())}
    assert {name: (row["against"], row["also_differs_in"]) for name, row in rows.items()} == {
        "moepp-lr-1": ("vanilla-lr-1", ""),
        "moepp-lr-3": ("vanilla-lr-1", "optim.lr, train.recompute"),
        "vanilla-lr-4": ("vanilla-lr-1", "optim.lr"),
    }
    page = (tmp_path / "runs/comparison/report.html").read_text()
    assert (
        "No twins, for they differ in more: moepp-lr-3 and vanilla-lr-1 (optim.lr, train.recompute); vanilla-lr-4"
        in page
    )


def log(path: Path, **values: float) -> None:
    """Append a record at the last step; ``__`` in a name stands for a slash."""
    record = {"step": 40, "tokens": 4000} | {name.replace("__", "/"): value for name, value in values.items()}
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def forget(path: Path, metric: str) -> None:
    """Take a metric out of every record."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({name: value for name, value in one.items() if name != metric}) for one in records]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def caption_of(page: Path) -> str:
    return page.read_text().split("<caption>", 1)[1].split("</caption>")[0]


def test_without_a_validation_loss_runs_are_ordered_by_another_loss(tmp_path):
    for name, shift, wiki in (("a", 0.5, 3.0), ("b", 0.0, 4.0), ("c", 0.25, 3.5)):
        path = make_run(tmp_path / "runs", name, shift=shift, tau=0.5 + shift)
        log(path, eval__wiki__loss=wiki)
        forget(path, "eval/loss")
    runs = str(tmp_path / "runs")
    page = tmp_path / "runs/comparison/report.html"
    assert main(["report", runs]) == 0 and caption_of(page) == "One row per run, by eval_loss/wiki, the lowest first"
    assert [row["run"] for row in compare(find_runs([runs]).runs)] == ["a", "c", "b"]
    forget(tmp_path / "runs/c", "eval/wiki/loss")
    assert main(["report", runs]) == 0 and caption_of(page) == "One row per run, by train_loss, the lowest first"
    assert [row["run"] for row in compare(find_runs([runs]).runs)] == ["b", "c", "a"]
    for name in "abc":
        forget(tmp_path / "runs" / name, "train/loss")
    assert main(["report", runs]) == 0 and caption_of(page) == "One row per run, by eval_loss/wiki, the lowest first"
    assert [row["run"] for row in compare(find_runs([runs]).runs)] == ["a", "b", "c"]
    for name in "ab":
        forget(tmp_path / "runs" / name, "eval/wiki/loss")
    assert main(["report", runs]) == 0 and caption_of(page) == "One row per run, by run, ascending"


def test_runs_with_named_validation_sets_alone_are_compared_by_the_first_that_all_have(tmp_path):
    """What they learned by heart does not count: the training loss says the contrary here."""
    for seed in (1, 2):
        make_pair(tmp_path / "runs", f"{seed}", 0.0, -0.5, run__seed=seed)
    for path in (tmp_path / "runs").iterdir():
        forget(path, "eval/loss")
        is_vanilla, seed = path.name.startswith("vanilla"), int(path.name[-1])
        if path.name != "moepp-2":
            log(path, eval__code__loss=9.0)
        log(path, eval__wiki__loss=(3.0 if is_vanilla else 3.25) + 0.01 * seed)
    make_run(tmp_path / "runs", "begun", tau=0.5, records=1)
    runs = find_runs([str(tmp_path / "runs")]).runs
    assert compared_loss(runs) == "eval/wiki/loss"
    [row, *_] = [row for row in differences(runs) if row["setting"] == "moepp"]
    assert row["loss_at_equal_tokens"] == pytest.approx(0.25)
    for figure in (frontier(runs), curve_charts(runs)[0]):
        assert figure is not None and figure.source.startswith("eval/wiki/loss")
        axes = MplFigure().subplots()
        figure.draw(axes, figures.Palette(placeholders=False))
        assert axes.get_ylabel() == "loss on wiki, nats per token"
    assert "vanilla (2 seeds) is lowest" in curve_charts(runs)[0].caption
    assert main(["report", str(tmp_path / "runs")]) == 0
    page = tmp_path / "runs/comparison/report.html"
    assert caption_of(page) == "One row per run, by eval_loss/wiki, the lowest first"
    assert "Losses are eval/wiki/loss;" in page.read_text()
    assert main(["report", str(tmp_path / "runs/moepp-1")]) == 0
    page = (tmp_path / "runs/moepp-1/report.html").read_text()
    assert "<dt>loss on wiki, nats per token</dt><dd>3.2600</dd>" in page


@pytest.mark.parametrize(
    ("column", "first", "text"),
    [
        ("eval/wikitext/word_perplexity", "a", "the lowest first"),
        ("eval/wikitext/byte_perplexity", "a", "the lowest first"),
        ("eval/wikitext/bits_per_byte", "a", "the lowest first"),
        ("eval/piqa/acc", "b", "the highest first"),
        ("eval/piqa/f1_character", "b", "the highest first"),
        ("eval_loss", "b", "the lowest first"),
        ("tokens_per_second", "a", "the highest first"),
        ("model.moe.tau", "b", "ascending"),
        ("run", "a", "ascending"),
    ],
)
def test_the_best_is_first_and_the_caption_says_by_what(tmp_path, column, first, text):
    for name, better in (("a", 0.0), ("b", -0.25)):
        path = make_run(tmp_path / "runs", name, shift=better, tau=0.75 + better)
        if column.startswith("eval/"):
            log(path, **{column: 0.5 - better})
    assert main(["report", str(tmp_path / "runs"), "--sort", column]) == 0
    assert caption_of(tmp_path / "runs/comparison/report.html") == f"One row per run, by {column}, {text}"
    rows = csv.DictReader((tmp_path / "runs/comparison/comparison.csv").open())
    assert next(rows)["run"] == first


def test_runs_of_nested_sweeps_are_found_once_and_told_apart(tmp_path, capsys):
    top = tmp_path / "runs"
    for folder, tau in (("a/x", 0.25), ("a/y", 0.5), ("b", 0.75)):
        make_run(top / folder, "run", tau=tau)
    make_run(top / "b", "alone", tau=1.0)
    make_run(top / "b/run", "inner")  # a run's own folders are not looked into
    make_run(top / "too/many/folders", "deep")
    (top / "latest").symlink_to(top / "b/run")
    (top / "loop").symlink_to(top)
    make_run(top / "a", "broken")
    (top / "a/broken/metrics.jsonl").write_text("")
    assert main(["report", str(top), "--table", str(tmp_path / "t.csv")]) == 0
    said = capsys.readouterr().out
    for file in (top / "comparison/comparison.csv", tmp_path / "t.csv"):
        rows = {row["run"]: row for row in csv.DictReader(file.open())}
        assert {name: row["path"] for name, row in rows.items()} == {
            "x/run": str(top / "a/x/run"),
            "y/run": str(top / "a/y/run"),
            "b/run": str(top / "b/run"),
            "alone": str(top / "b/alone"),
        }
        assert rows["y/run"]["model.moe.tau"] == "0.5"
    assert "x/run" in said and "note: a/broken is left out" in said
    page = (top / "comparison/report.html").read_text()
    assert all(f"<td>{name}" in page or f">{name}</th>" in page for name in ("x/run", "y/run", "b/run"))


def test_a_folder_holds_nothing_of_an_earlier_comparison(tmp_path, capsys):
    out = tmp_path / "out"
    for seed in (1, 2):
        make_run(tmp_path / "runs", f"moepp-{seed}", seed=seed)
        log(make_run(tmp_path / "runs", f"vanilla-{seed}", seed=seed, vanilla=True), eval__wiki__loss=3.0)
    assert main(["report", str(tmp_path / "runs"), "--out", str(out)]) == 0
    (out / "figures/mine.png").write_text("mine")
    (out / "mine.csv").write_text("mine")
    first = {str(path.relative_to(out)) for path in out.rglob("*.*")}
    assert first >= {"seeds.csv", "differences.csv", "figures/loss-1-wiki.png", "figures/frontier.png"}
    runs = [str(tmp_path / f"runs/{name}") for name in ("moepp-1", "moepp-2")]
    for path in runs:
        change_config(Path(path), optim__lr=0.001 * int(path[-1]))
    assert main(["report", *runs, "--out", str(out)]) == 0
    left = {str(path.relative_to(out)) for path in out.rglob("*.*")}
    assert first - left == {"seeds.csv", "differences.csv", "figures/loss-1-wiki.png"} and left < first
    assert {"mine.csv", "figures/mine.png"} <= left, "what somebody else put there stays"
    (out / "seeds.csv").write_text("of an earlier version, whose page names no files")
    (out / "report.html").write_text((out / "report.html").read_text().replace('name="files"', ""))
    assert main(["report", *runs, "--out", str(out)]) == 0 and not (out / "seeds.csv").exists()
    assert main(["report", *runs, "--out", runs[0]]) == 2
    assert "is the directory of a run" in capsys.readouterr().err


def test_a_runs_page_removes_its_own_old_figures_and_no_other_file(tmp_path):
    path = make_run(tmp_path, "one")
    assert main(["report", str(path)]) == 0
    before = {file.name for file in (path / "figures").iterdir()}
    page = (path / "report.html").read_text().replace("figures/memory.png", "figures/memory.png metrics.jsonl ../x.png")
    (path / "report.html").write_text(page)
    (tmp_path / "x.png").write_text("x")
    forget(path, "memory/peak_allocated_bytes")
    assert main(["report", str(path)]) == 0
    assert before - {file.name for file in (path / "figures").iterdir()} == {"memory.png"}
    assert (path / "metrics.jsonl").exists() and (tmp_path / "x.png").exists()


def test_seeds_in_folders_of_their_own_are_called_by_their_common_name(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / f"seed{seed}", "moepp", seed=seed)
        make_run(tmp_path / f"seed{seed}", "vanilla", seed=seed, vanilla=True)
    groups = group_runs(find_runs([str(tmp_path)]).runs)
    assert [(group.label, [run.name for run in group.runs]) for group in groups] == [
        (name, [f"seed1/{name}", f"seed2/{name}"]) for name in ("moepp", "vanilla")
    ]
    for seed in (1, 2):
        for tau in (0.25, 0.5):
            make_run(tmp_path / f"sweep/seed{seed}/tau{tau}", "run", seed=seed, tau=tau)
    groups = group_runs(find_runs([str(tmp_path / "sweep")]).runs)
    assert [group.label for group in groups] == ["tau0.25/run", "tau0.5/run"]

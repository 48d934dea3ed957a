"""Which runs are seeds of one setting, what each is compared with, how they are named and ordered."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from moepp.analysis import figures
from moepp.analysis.comparison import text_of
from moepp.analysis.curves import group_runs
from moepp.analysis.differences import differences
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

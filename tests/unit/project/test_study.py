"""The small study: its pieces differ in what their names say, and its driver leaves and continues them."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir

from moepp.analysis.runs import Run
from moepp.config import Config, from_hydra, register_defaults, to_dict, validate
from moepp.config.compare import differing_keys

ROOT = Path(__file__).resolve().parents[3]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"launch/{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses and study_collect look
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return script("study")


@pytest.fixture(scope="module")
def page() -> ModuleType:
    return script("study_page")


@pytest.fixture(scope="module")
def configurations(study) -> dict[str, Config]:
    register_defaults()
    with initialize_config_dir(config_dir=str(ROOT / "configs"), version_base=None):
        return {name: from_hydra(compose("config", study.command_of(name, Path(name))[2:])) for name in study.PIECES}


def test_pieces_train_as_many_tokens_on_the_same_data_and_differ_in_one_thing(study, configurations):
    main = configurations["moepp-seed1"]
    assert main.train.steps * main.train.global_batch_size * main.data.seq_len >= 8_000_000
    for name, cfg in configurations.items():
        validate(cfg, 1)
        assert cfg.run.path == name and cfg.run.seed == int(name[-1])
        optim = replace(cfg.optim, lr=main.optim.lr)
        same = replace(
            cfg, run=main.run, model=main.model, optim=optim, train=replace(cfg.train, micro_batch_size=None)
        )
        assert same == main, name
        differing = differing_keys([to_dict(cfg.model), to_dict(main.model)])
        kinds = {"moe.num_zero_experts", "moe.num_copy_experts", "moe.num_constant_experts"}
        if name.startswith("vanilla"):
            assert kinds <= differing <= kinds | {"moe.gating_residual", "moe.balance_loss_weight", "init_std"}, name
        elif name == "only_zero-seed1":
            assert differing == kinds - {"moe.num_zero_experts"}
        else:
            assert len(differing) <= 1, name


def test_no_piece_reads_a_source_twice_by_its_weight(configurations):
    """Tokens of each source's training documents, in the order of data.paths, rounded down to 0.1 million."""
    available = (3.0, 1.4, 1.7, 12.1, 9.3, 7.0, 3.3, 3.3, 3.3, 1.4)
    cfg = configurations["moepp-seed1"]
    assert cfg.data.weights is not None and sum(cfg.data.weights) == pytest.approx(1)
    tokens = cfg.train.steps * cfg.train.global_batch_size * cfg.data.seq_len / 1e6
    assert all(weight * tokens < have / 2 for weight, have in zip(cfg.data.weights, available, strict=True))


TRAINING = """
import json, pathlib, signal, sys, time
folder, last = pathlib.Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
metrics = folder / "metrics.jsonl"
is_first = not metrics.exists()
step = 0 if is_first else metrics.read_text().count("\\n")
while step < last:
    step += 1
    with metrics.open("a") as stream:
        stream.write(json.dumps({"step": step}) + "\\n")
    time.sleep(30 if is_first and step == 5 else 0.01)  # it cannot be done before it is left
sys.exit(3 if last == 4 else 0)
"""


def test_a_piece_is_left_continued_finished_and_then_let_be(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(study, "command_of", lambda name, folder: [sys.executable, "-c", TRAINING, str(folder), name])
    lines = lambda: (tmp_path / "12/metrics.jsonl").read_text().splitlines()  # noqa: E731
    assert study.run_piece("12", tmp_path, 3) and 3 <= len(lines()) < 12
    left = lines()
    assert study.run_piece("12", tmp_path, 3) and lines() == left
    assert study.run_piece("12", tmp_path, None) and json.loads(lines()[-1]) == {"step": 12} and len(lines()) == 12
    assert study.run_piece("12", tmp_path, None) and len(lines()) == 12
    assert not study.run_piece("4", tmp_path, None) and not (tmp_path / "4.done").exists()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1].rstrip(",") for line in said] == ["left", "at", "finished", "at", "failed"]


def test_every_number_on_the_page_is_that_of_the_committed_metrics(page, monkeypatch):
    text = page.PAGE.read_text()
    assert page.filled(text) == text, "run python launch/study_page.py"
    read = page.read
    other = lambda name: [row | {"eval_loss": "9.8765", "loss": "9.8765"} for row in read(name)]  # noqa: E731
    monkeypatch.setattr(page, "read", other)
    assert page.filled(text) != text


def test_every_piece_has_a_title_and_every_figure_is_there(study, page):
    assert all(page.title(name) for name in study.PIECES)
    figures = re.findall(r"\]\((study/[^)]+\.png)\)", page.PAGE.read_text())
    assert figures and all((page.DOCS / figure).is_file() for figure in figures)


def test_the_twin_is_read_off_at_equal_expert_work(page):
    curve = page.Curve("moepp_lr_0.001-seed2", [1, 2], [10, 20], [5.0, 4.0], [20.0, 40.0], [2.0, 2.0], [1.0, 1.0])
    assert curve.twin == "vanilla_lr_0.001-seed2" and curve.loss_at(20) == 4.0 and curve.loss_at(15) is None
    assert curve.loss_at_rows(35.0) == pytest.approx(4.25)
    assert curve.loss_at_rows(19.0) is None and curve.loss_at_rows(41.0) is None


def test_a_curve_adds_up_the_ffn_experts_since_the_start(page):
    collect = script("study_collect")
    layers = ({"routing/layer_0/max_over_mean": a, "routing/layer_1/max_over_mean": 3.0} for a in (1.0, 2.0, 5.0))
    steps = [
        {"step": n, "tokens": 100 * n, "routing/ffn_per_token": ffn} | layer
        for n, ffn, layer in zip((1, 2, 3), (2.0, 1.0, 0.5), layers, strict=True)
    ]
    records = [*steps[:2], {"step": 2, "tokens": 200, "eval/loss": 4.56789}, steps[2]]
    records.append({"step": 3, "tokens": 300, "eval/loss": 4.0})
    rows = collect._curve(Run(Path("a-seed1"), records))
    assert [row["ffn_rows"] for row in rows] == [300, 350]
    assert [row["eval_loss"] for row in rows] == [4.5679, 4.0]
    assert [row["max_over_mean"] for row in rows] == [2.25, 4.0] and rows[0]["ffn_per_token"] == 1.5

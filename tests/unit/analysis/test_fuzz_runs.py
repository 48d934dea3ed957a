"""Damaged and foreign run directories: watch and report read them, or refuse them in one line."""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from moepp.analysis import figures
from moepp.analysis.runs import read_run
from moepp.analysis.watch import panel
from moepp.cli import report
from moepp.errors import MoeppError, RunError
from moepp.runs.report import draw_loss
from tests.fuzz_loading import mutated
from tests.run_files import make_run, write_routing, write_token_tables

SAMPLE, INPUTS = 8, 60  # in the default suite and in both
NUMBERS = ("0", "-1", "-0.0", "1e12", "-1e300", "1e308", "5e-324", "1.0", f"{10**18}", f"{10**19}", "9" * 5000, "1e999")
JSON = (*NUMBERS, "null", "true", '"x"', '"\\u001b[2J"', "[]", "[[]]", "[null]", "{}", '{"ffn": 1}', '{"a": []}')
YAML = (
    *(
        *NUMBERS,
        "0xf" + "f" * 5000,
        "0b" + "1" * 70,
        "1" + ":59" * 900,
        "2001-01-01",
        ".inf",
        ".nan",
        "~",
        "[1, {a: b}]",
    ),
    *("!!set {a, b}", "!!binary aGk=", "!!omap [a: 1]", "{1: 2, ~: 3}", "{? [a] : b}", "'x\\e[2J'", '"\\e[2J"', "yes"),
)


@pytest.fixture(autouse=True)
def no_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_png", lambda draw: b"png")
    monkeypatch.setattr(figures, "_svg", lambda *of: "<svg></svg>")
    monkeypatch.setattr("moepp.runs.report.draw_loss", lambda *of: None)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_run(tmp_path_factory.mktemp("template"), "run", records=6)
    write_routing(path)
    write_token_tables(path)
    (path / "samples.json").write_text(json.dumps([{"prompt": "a", "continuation": "b"}], indent=1))
    (path / "report.json").write_text(json.dumps({"unigram_entropy": 7.5, "samples": []}, indent=1))
    (path / "environment.json").write_text(json.dumps({"world_size": 2, "started": "2026-01-01T00:00:00"}, indent=1))
    return path


def planted(text: str, values: tuple[str, ...], draw: random.Random) -> str:
    """Put another value into one place of JSON or block YAML, at any depth."""
    places = list(re.finditer(r"(?<=: )([^\s,{}\[\]]+|\[\]|\{\})|(?<=[\[ ])[-0-9.e]+(?=[,\]])", text))
    for place in sorted(draw.sample(places, min(len(places), draw.choice((1, 1, 2, 5)))), key=lambda one: -one.start()):
        text = text[: place.start()] + draw.choice(values) + text[place.end() :]
    return text


def of_lines(text: str, draw: random.Random) -> str:
    """Double, swap or leave out lines, and now and then plant values in all of them."""
    lines = text.splitlines()
    for _ in range(draw.choice((0, 1, 3))):
        at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
        lines[at], lines[other] = draw.choice(((lines[other], lines[at]), (lines[at], lines[at])))
    return planted("\n".join(lines[: draw.choice((1, len(lines)))]) + "\n", JSON, draw)


KINDS: dict[str, Callable[[str, random.Random], str]] = {
    "metrics.jsonl": of_lines,
    "routing.jsonl": of_lines,
    "config.yaml": lambda text, draw: planted(text, YAML, draw),
    "samples.json": lambda text, draw: planted(text, JSON, draw),
    "report.json": lambda text, draw: planted(text, JSON, draw),
    "environment.json": lambda text, draw: planted(text, JSON, draw),
}


def damage(run: Path, number: int) -> str:
    draw = random.Random(f"run {number}")
    name = draw.choice([*KINDS, *KINDS, "tokens/types.parquet"])
    file = run / name
    if name not in KINDS:
        files = sorted((run / "tokens").iterdir())
        draw.choice(files).rename(
            run / "tokens" / draw.choice(("types.parquet", "\x1b[2J.parquet", "a\nb.parquet", "x"))
        )
        return name
    if draw.random() < 0.3:
        file.write_bytes(mutated(file.read_bytes(), draw))
    else:
        file.write_text(KINDS[name](file.read_text(), draw))
    return name


def outcome(run: Path, out: Path) -> str:
    """Read a run as both commands do; anything but a project's own error of one line escapes."""
    ended = []
    for read in (lambda: show(run), lambda: page(run, out)):
        try:
            read()
            ended.append("read")
        except MoeppError as error:
            assert str(error).isprintable() and len(str(error)) < 1000, repr(str(error))
            ended.append("refused")
    return ", ".join(ended)


def show(run: Path) -> None:
    stream = io.StringIO()
    Console(file=stream, width=100, highlight=False).print(panel(read_run(run), 1e9, 100))
    assert "\x1b" not in stream.getvalue()


def page(run: Path, out: Path) -> None:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    report.run(parser.parse_args([str(run), "--out", str(out), "--unigram-entropy", "7"]))


def check(template: Path, tmp_path: Path, numbers: range) -> None:
    counts: Counter[str] = Counter()
    for number in numbers:
        run, out = tmp_path / "run", tmp_path / "out"
        for folder in (run, out):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, run)
        name = damage(run, number)
        try:
            counts[f"{name}: {outcome(run, out)}"] += 1
        except Exception as error:
            raise AssertionError(f"input {number} ({name}) escaped: {type(error).__name__}: {error}") from error
    print(f"watch, report: {dict(sorted(counts.items()))}")
    assert any("read, read" in name for name in counts) and any("refused" in name for name in counts)


def test_damaged_runs_are_read_or_refused_in_one_line(template, tmp_path):
    check(template, tmp_path, range(SAMPLE))


@pytest.mark.slow
def test_many_damaged_runs_are_read_or_refused_in_one_line(template, tmp_path):
    check(template, tmp_path, range(SAMPLE, INPUTS))


KEY = "routing/layer_0/share_ffn"
FOREIGN = {
    "more than all": ("metrics.jsonl", f'"{KEY}": 0.5', f'"{KEY}": 1e12', None),
    "less than nothing": ("metrics.jsonl", f'"{KEY}": 0.5', f'"{KEY}": -1e99', None),
    "no speed": (
        "metrics.jsonl",
        '"throughput/tokens_per_second": 600.0',
        '"throughput/tokens_per_second": 5e-324',
        None,
    ),
    "tokens that go back": ("metrics.jsonl", '"tokens": 5000', '"tokens": 50', "goes back from tokens 4000 to 50"),
    "tokens below nothing": ("metrics.jsonl", '"tokens": 5000', '"tokens": -1', "line 7 is not a JSON object"),
    "a step beyond all": ("metrics.jsonl", '"step": 50', f'"step": {10**19}', "line 7 is not a JSON object"),
    "many hexadecimal digits": ("config.yaml", "steps: 40", "steps: 0x" + "f" * 5000, None),
    "a set": ("config.yaml", "vocab_size:", "more: !!set {a, b}\n  vocab_size:", None),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_numbers_and_kinds_that_no_run_has(name, template, tmp_path, caplog):
    file, before, after, refused = FOREIGN[name]
    run = Path(shutil.copytree(template, tmp_path / "run"))
    text = (run / file).read_text()
    assert before in text
    (run / file).write_text(text.replace(before, after))
    if refused is None:
        assert outcome(run, tmp_path / "out") == "read, read"
        assert file != "config.yaml" or "config.yaml is not valid YAML" in caplog.text + read_run(run).config_problem
    else:
        with pytest.raises(RunError, match=refused):
            read_run(run)


@pytest.mark.parametrize(
    "change", [{"layers": [], "kinds": {"ffn": 1}, "share": [], "gates": {}}, {"kinds": {"copy": 12}}, {"kinds": {}}]
)
def test_a_routing_history_without_layers_or_ffn_experts_is_refused(change, template, tmp_path):
    run = Path(shutil.copytree(template, tmp_path / "run"))
    lines = [json.dumps(json.loads(line) | change) for line in (run / "routing.jsonl").read_text().splitlines()]
    (run / "routing.jsonl").write_text("\n".join(lines) + "\n")
    assert outcome(run, tmp_path / "out") == "read, read"
    assert "routing.jsonl line 1 is not" in read_run(run).notes[-1]


def test_losses_beyond_all_sense_are_left_out(template, tmp_path):
    run = Path(shutil.copytree(template, tmp_path / "run"))
    text = (run / "metrics.jsonl").read_text()
    for before, after in ((3.0, "1e308"), (4.0, "-1e308"), (5.0, "-1e99"), (2.0, "1e99")):
        text = text.replace(f'"train/loss": {before}', f'"train/loss": {after}')
    (run / "metrics.jsonl").write_text(text)
    found = read_run(run)
    assert found.faults[0].startswith("train/loss is not finite in 2 of 9 records")
    draw_loss(found.records, io.BytesIO(), 7.0)
    show(run)

"""Files of a run that somebody else has made: read in one line or refused in one, and shown without harm."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moepp.cli import generate, model_card
from moepp.cli import main as cli
from moepp.config import from_dict, to_dict
from moepp.config.compare import breaking_differences
from moepp.data.indexed import open_indexed
from moepp.data.tokenizer import Tokenizer
from moepp.errors import CheckpointError, ConfigError, DataError, RunError
from moepp.evaluation import data as evaluation_data
from moepp.evaluation.results import BenchmarkResult, Subject, read_results, table_text, write_results
from moepp.metrics.jsonl import read_records
from moepp.metrics.logs import close_logging, setup_logging
from moepp.runs.directory import RunDir, _read_config
from moepp.runs.report import read_inputs
from tests.data_files import make_config, write_indexed

ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202e"
NO_JSON = ["", "{", "[" * 10**5 + "]" * 10**5, '{"a": ' + "9" * 5000 + "}", "[NaN]", '["\\ud800"]']


def harmless(text: str) -> None:
    assert not set(text) & set("\x1b\x07\u202e\x9b\r"), ascii(text)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("nothing", "does not exist"),
        ("folder", "is a folder"),
        ("pipe", "is no file, but a pipe or a device"),
        ("loop", "cannot be reached (Too many levels of symbolic links)"),
        ("dangling", "is a symbolic link that leads nowhere"),
        ("below", "cannot be reached (Not a directory)"),
    ],
)
def test_what_lies_where_a_file_should_is_said(tmp_path, kind, why):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "file").touch()
    path = tmp_path / ("file/below" if kind == "below" else kind)
    with pytest.raises(DataError, match=re.escape(f"tokenizer {path} {why}; check data.tokenizer")):
        Tokenizer(str(path))
    write_indexed(tmp_path / "text", [[1, 2]])
    (tmp_path / "text.idx").unlink()
    if kind != "below":
        (tmp_path / "text.idx").symlink_to(path)
        said = "is a symbolic link that leads nowhere" if kind == "nothing" else why
        with pytest.raises(DataError, match=re.escape(f"text.bin exists and {tmp_path}/text.idx {said}; an")):
            open_indexed(str(tmp_path / "text"))


# --- configuration


def tree_of(tmp_path: Path) -> dict[str, Any]:
    return to_dict(make_config(paths=[str(tmp_path / "text")]))


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "x" * 300, "é" * 200, "\u202eabc", "a\0b", "\ud800", "a\rb", ""])
def test_names_that_harm_are_refused(tmp_path: Path, name: str) -> None:
    tree = tree_of(tmp_path)
    tree["run"]["name"] = name
    with pytest.raises(ConfigError) as caught:
        from_dict(tree)
    assert str(caught.value).isprintable() and "run.name" in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("value", ["a\nb", ESCAPES, "x" * 10**6, 10**400, -(10**400), "\ud800", {"a": [1] * 10**6}])
def test_every_text_and_number_is_bounded(tmp_path: Path, value: Any) -> None:
    for section, key in (("run", "dir"), ("data", "tokenizer"), ("optim", "lr"), ("train", "steps"), ("data", "paths")):
        tree = tree_of(tmp_path)
        tree[section][key] = [value] if key == "paths" else value
        with pytest.raises(ConfigError) as caught:
            from_dict(tree)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_unknown_keys_and_choices_are_shown_harmlessly(tmp_path: Path) -> None:
    for change in ({ESCAPES: 1}, {"x" * 10**6: 1}, {"run": ESCAPES}, {"engine": {"name": "n" * 10**4}}):
        with pytest.raises(ConfigError) as caught:
            from_dict(tree_of(tmp_path) | change)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 3000


def test_no_environment_gets_into_the_configuration_of_another_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    tree = tree_of(tmp_path)
    tree["run"]["name"] = "${oc.env:SECRET}"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    read = _read_config(RunDir(tmp_path))
    assert from_dict(read).run.name == "${oc.env:SECRET}" and "hunter2" not in str(read)


@pytest.mark.parametrize(
    "text", ["a: &a [x]\nb: *a", "a: !!python/name:os.system ''", "[" * 10**5, "- 1", "", "a: " + "9" * 5000, "a: \x1b"]
)
def test_config_of_a_run_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RunError, match=r"without a readable config\.yaml"):
        _read_config(RunDir(tmp_path))
    (tmp_path / "config.yaml").unlink()
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(RunError, match=r"without a readable config\.yaml"):
        _read_config(RunDir(tmp_path))


def test_differences_are_shown_harmlessly() -> None:
    for old in ({"model": {f"x{ESCAPES}": ESCAPES}}, {"data": {"paths": [ESCAPES]}}):
        [line] = breaking_differences(old, {})
        assert line.isprintable()


# --- terminal


def test_errors_logs_and_generated_text_command_no_terminal(tmp_path: Path, capsys: Any) -> None:
    def fail() -> int:
        raise CheckpointError(f"name {ESCAPES}\nsecond line")

    assert cli.report_errors(fail) == 2
    generate._print(f"one\n{ESCAPES}two")
    setup_logging(tmp_path, 0)
    try:
        logging.getLogger("moepp").warning("changed: %s", ESCAPES)
    finally:
        close_logging()
    shown = capsys.readouterr()
    harmless(shown.out + shown.err + (tmp_path / "log" / "rank-0.txt").read_text())
    assert shown.out.startswith("one\n") and shown.out.endswith("two") and "second line" in shown.err


# --- metrics and report


@pytest.mark.parametrize(
    "line",
    [
        *NO_JSON,
        '{"step": "1", "tokens": 1}',
        '{"step": true, "tokens": 1}',
        '{"step": 1, "tokens": 1, "x": "text"}',
        '{"step": 1, "tokens": 1, "x": [1]}',
        '{"step": 1, "tokens": 1, "x": true}',
        '{"step": 1, "tokens": 1, "x": 1e999}',
    ],
    ids=range(12),
)
def test_records_that_are_none_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "tokens": 2, "x": 1.5, "y": null}\n'
    path.write_text(good)
    assert read_records(path) == [{"step": 1, "tokens": 2, "x": 1.5, "y": None}]
    path.write_text(good + line + "\n" + good)
    with pytest.raises(RunError, match="line 2"):
        read_records(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RunError, match="not a regular file"):
        read_records(path)


@pytest.mark.parametrize("name", ["report.json", "samples.json"])
@pytest.mark.parametrize(
    "text",
    [
        *NO_JSON,
        "3",
        '["x"]',
        '[{"prompt": 1}]',
        '{"unigram_entropy": "x", "samples": []}',
        '{"unigram_entropy": true, "samples": []}',
        '{"unigram_entropy": 1, "samples": [1]}',
        '{"unigram_entropy": 1, "samples": "abc"}',
    ],
    ids=range(13),
)
def test_report_files_that_are_none_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match="remove it") as caught:
        read_inputs(RunDir(tmp_path))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_samples_command_no_terminal(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text(json.dumps([{"prompt": ESCAPES, "continuation": f"one\n{ESCAPES}"}]))
    [sample] = read_inputs(RunDir(tmp_path)).samples
    harmless(sample)


# --- results and model card

RESULT = BenchmarkResult("piqa", {"acc": 0.5}, {"acc": 0.1}, 0.5, 0, 10, 20, 0, "here", ("a note",))


def test_results_are_read_as_written(tmp_path: Path) -> None:
    results = [RESULT, replace(RESULT, name="x", metrics={"ppl": 3.5}, stderr={}, chance=None)]
    write_results(tmp_path / "a.json", results, Subject("run", 1, 2), {})
    assert read_results(tmp_path / "a.json") == results


@pytest.mark.parametrize(
    "change",
    [
        *({key: value} for key in ("name", "origin") for value in (1, None, "a\nb", ESCAPES, "x" * 10**5)),
        *({"metrics": value} for value in (None, [], 1, {"acc": "1"}, {"acc": True}, {ESCAPES: 1})),
        *({"notes": value} for value in (None, 1, [1], ["```\n# Title"], [ESCAPES])),
        *({key: value} for key in ("shots", "documents", "requests", "truncated") for value in (-1, "1", None, 1.5)),
        {"chance": "x"},
        {"more": 1},
    ],
)
def test_results_that_are_none_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "a.json"
    write_results(path, [RESULT], Subject("run", 1, 2), {})
    tree = json.loads(path.read_text())
    tree["results"][0] |= change
    path.write_text(json.dumps(tree))
    with pytest.raises(RunError) as caught:
        table_text(read_results(path), Subject("run"))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_model_card_shows_names_as_text(tmp_path: Path) -> None:
    assert model_card._plain("my_run-1.5") == "my_run-1.5"
    name = "<script>x</script> | [a](http://b) `c` **d** ~~~"
    shown = model_card._plain(name)
    assert all(f"\\{c}" in shown for c in "<>|[]`*~") and "\n" not in model_card._plain("a\n---\nlicense: x")
    cfg = make_config(paths=[str(tmp_path / name.replace("/", ""))])
    cfg = replace(cfg, run=replace(cfg.run, name=name.replace("/", "")))
    cfg = replace(cfg, init=replace(cfg.init, path="x " * 60 + "``` <b>", format="official"))
    card = model_card._training(cfg) + "\n" + model_card._data(cfg, Subject("x", 1, 1))
    fences = [line for line in card.splitlines() if line.lstrip().startswith("```")]
    assert fences == ["```yaml", "```"] and "| \\<script" in card


# --- evaluation data


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("text", [*NO_JSON[1:], "[1]", "3", '"x"'])
def test_documents_that_are_none_are_refused(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"test{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    with pytest.raises(DataError) as caught:
        evaluation_data._read_documents(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_packed_documents_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_data, "MAX_BYTES", 1 << 20)
    path = tmp_path / "test.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": "' + b"x" * (1 << 21) + b'"}'))
    with pytest.raises(DataError, match="holds more than"):
        evaluation_data._read_documents(path)
    path.write_bytes(gzip.compress(b'{"a": "x"}\n\n{"a": "y"}\n')[:-4])
    with pytest.raises(DataError, match="cannot be read"):
        evaluation_data._read_documents(path)
    path.write_bytes(gzip.compress(b'{"a": "x"}\n\n{"a": "y"}\n'))
    assert evaluation_data._read_documents(path) == [{"a": "x"}, {"a": "y"}]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz", ".parquet"])
def test_documents_are_regular_files(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("datasets")
    os.mkfifo(tmp_path / f"test{suffix}")
    with pytest.raises(DataError, match="regular file"):
        evaluation_data._read(tmp_path / f"test{suffix}")


# --- pipes, devices, memory


def run_limited(program: str, *arguments: object, seconds: float = 60) -> str:
    """Output of a program in a process of its own: no exception that it swallows can end it, only the time limit."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readers_take_memory_for_what_is_there_and_refuse_what_does_not_fit(tmp_path: Path) -> None:
    line = '{"step": 1, "tokens": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(line)
    (tmp_path / "long.jsonl").write_text(line * 30_000)
    with (tmp_path / "zeros.jsonl").open("wb") as stream:
        stream.write(line.encode())
        stream.truncate(1 << 28)
    (tmp_path / "test.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(b'{"a": 2}\n'))
    program = """
import resource, sys
from pathlib import Path
from moepp.errors import RunError
from moepp.evaluation.data import _read_documents
from moepp.io.untrusted import read_bytes
from moepp.metrics.jsonl import JsonlSink, read_records
folder = Path(sys.argv[1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (160 << 20), -1))
JsonlSink(folder / "metrics.jsonl", 1).close()
print(read_records(folder / "metrics.jsonl"), read_records(folder / "zeros.jsonl"))
print(_read_documents(folder / "test.jsonl"), _read_documents(folder / "test.jsonl.gz"))
print(len(read_bytes(folder / "test.jsonl", 1 << 40)))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), -1))
for start in (lambda: read_records(folder / "long.jsonl"), lambda: JsonlSink(folder / "long.jsonl", 5)):
    try:
        start()
    except RunError as error:
        print(error)
"""
    record = "[{'step': 1, 'tokens': 2}]"
    refused = f"cannot read {tmp_path}/long.jsonl: it does not fit into memory; name the directory of a run"
    printed = run_limited(program, tmp_path).splitlines()
    assert printed == [f"{record} {record}", "[{'a': 1}] [{'a': 2}]", "9", refused, refused]
    assert (tmp_path / "long.jsonl").read_text() == line * 30_000


def test_a_line_too_long_for_a_record_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moepp.metrics.jsonl.MAX_JSON_BYTES", 64)
    path, good = tmp_path / "metrics.jsonl", '{"step": 1, "tokens": 2}\n'
    path.write_text(good + "[" * 1000 + "\n" + good)
    with pytest.raises(RunError, match="line 2"):
        read_records(path)
    path.write_bytes(good.encode() + b"\0" * 1000 + b"\n" + b"\0" * 1000)
    assert read_records(path) == [{"step": 1, "tokens": 2}]


def test_pipes_and_devices_in_a_run_make_no_command_wait(tmp_path: Path) -> None:
    names = [".lock", "log/rank-0.txt", "metrics.jsonl", "report.html", "config.yaml"]
    for kind, name in itertools.product(("pipe", "device"), names):
        run = tmp_path / kind / name.replace("/", ".")
        (run / "log").mkdir(parents=True)
        (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 2, "train/loss": 3.5}\n')
        (run / "config.yaml").write_text("train: {steps: 5}\n")
        (run / name).unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(run / name)
        else:
            (run / name).symlink_to("/dev/zero")
    program = """
import sys
from pathlib import Path
from moepp.analysis.page_folder import own_folder
from moepp.cli import main, watch
from moepp.runs.directory import _write_keeping_previous
for run in sorted(Path(sys.argv[1]).glob("*/*")):
    print(run)
    for call in (lambda: main.main(["watch", "--once", str(run)]),
                 lambda: print(watch.look(run, 80)) or 0,
                 lambda: own_folder(run, "moepp report", run) and 0,
                 lambda: _write_keeping_previous(run / "config.yaml", "x") or 0):
        print(main.report_errors(call))
"""
    parts = re.split(rf"^{tmp_path}/(\S+)$", run_limited(program, tmp_path), flags=re.MULTILINE)[1:]
    codes = {run: re.findall(r"^[0-9]$", text, re.MULTILINE) for run, text in zip(parts[::2], parts[1::2], strict=True)}
    refused = {"metrics.jsonl": ["2", "0", "0", "0"], "report.html": ["0", "0", "2", "0"]}
    refused["config.yaml"] = ["0", "0", "0", "2"]
    assert codes == {
        f"{kind}/{n.replace('/', '.')}": refused.get(n, ["0"] * 4) for kind in ("device", "pipe") for n in names
    }

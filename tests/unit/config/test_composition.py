"""A user's own configuration files that cannot be read: one line with the file, and the sweep's other jobs run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from moepp.cli.main import main
from moepp.config import composition_error, configs_folder, from_hydra, register_defaults
from moepp.errors import ConfigError
from moepp.training import sweep
from moepp.training.sources import Sources
from tests.official_cases import GOLDEN

register_defaults()
# Content of model/mine.yaml, and what is said of it; {file} stands for its path.
BROKEN = {
    "a bracket left open": (
        b"num_layers: 2\na: [1,\nb: }\n",
        "{file} line 3: expected the node content, but found",
    ),
    "a key twice": (b"num_layers: 2\nnum_layers: 3\n", "{file} line 2: found duplicate key num_layers"),
    "a tab": (b"moe:\n\ttau: 1\n", "{file} line 2: found character '\\t' that cannot start any token"),
    "Latin-1": (b"#" * 9000 + b"\n# caf\xe9\n", "{file} line 2: the byte 0xe9 is not UTF-8 text; save the file as UTF"),
    "UTF-16": ("num_layers: 2".encode("utf-16"), "{file} line 1: the byte 0xff is not UTF-8"),
    "a NUL": (b"a: \x00\n", "{file} is not YAML: unacceptable character #x0000"),
    "two documents": (b"a: 1\n---\nb: 2\n", "{file} line 2: but found another document"),
    "an object": (b"a: !!python/object:os.system x\n", "{file} line 1: could not determine a constructor"),
    "a number alone": (b"3\n", "{file} is no configuration: Invalid loaded object type: int"),
    "a list": (b"- 1\n", "model/mine.yaml holds a list where keys and values belong"),
    "deep nesting": (b"a: " + b"[" * 3000, "{file} holds too many values inside one another"),
    "many digits": (b"num_layers: " + b"9" * 5000, "{file} is no configuration: Exceeds the limit (4300 digits)"),
    "a set": (b"a: !!set {x, y}\n", "{file} is no configuration: Value 'set' is not a supported primitive type"),
    "a reference left open": (b"num_layers: ${\n", "{file} is no configuration: no viable alternative at input '${'"),
    "a bad header": (b"# @package a b\nnum_layers: 2\n", "{file} is no configuration: Too many components"),
    "no list of defaults": (b"defaults: tiny\n", "Invalid defaults list in 'model/mine', defaults must be a list"),
    "itself": (b"defaults: [mine]\n", "name one another in a circle"),
    "a default that is missing": (b"defaults: [nope]\n", "model/mine.yaml names model/nope in its defaults list"),
}


def own_file(folder: Path, content: bytes | None = None) -> Path:
    (folder / "own/model").mkdir(parents=True, exist_ok=True)
    file = folder / "own/model/mine.yaml"
    if content is not None:
        file.write_bytes(content)
    return file


def sources(folder: Path) -> Sources:
    return Sources(str(configs_folder()), str(folder / "own"), "config")


def said_of(folder: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        sweep.configuration(sources(folder), ["model=mine"])
    message = str(refused.value)
    assert "\n" not in message and len(message) < 500 and ";" in message
    return message


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_file_is_said_in_one_line(name, tmp_path):
    content, expected = BROKEN[name]
    file = own_file(tmp_path, content)
    assert expected.replace("{file}", str(file)) in said_of(tmp_path)


def test_what_lies_there_and_is_no_file_is_named(tmp_path):
    file = own_file(tmp_path)
    file.mkdir()
    assert f"model=mine: {file} is a folder" in said_of(tmp_path)
    file.rmdir()
    file.symlink_to("nowhere")
    assert f"model=mine: {file} is a symbolic link that leads nowhere" in said_of(tmp_path)
    file.unlink()
    os.mkfifo(file)
    assert f"model=mine: {file} is no file, but a pipe or a device" in said_of(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    own_file(tmp_path).symlink_to("/proc/self/mem")  # an I/O error for whoever reads it, root too
    assert re.search(r"cannot read /proc/\d+/mem: Input/output error; make it readable", said_of(tmp_path))


@pytest.mark.parametrize("content", [BROKEN["a bracket left open"][0], BROKEN["Latin-1"][0], BROKEN["itself"][0]])
def test_a_sweep_refuses_the_jobs_of_the_broken_file_alone(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moepp.training.inputs.InputChecks.check", lambda *_: None)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    own_file(tmp_path, content)
    made = sweep.plan(sources(tmp_path), ["model=tiny,mine", "optim.lr=1e-3,2e-3"])
    assert made is not None
    errors = [job.error for job in made.jobs()]
    assert errors[:2] == [None, None] and all(isinstance(error, ConfigError) for error in errors[2:])


def test_plan_and_import_say_it_as_well(tmp_path, capsys, monkeypatch):
    file = own_file(tmp_path, b"a: [")
    assert main(["plan", "--ranks", "1", "--config-dir", str(tmp_path / "own"), "model=mine"]) == 2
    assert f"error: {file} line 1: " in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("run: {name: a, name: b}\n")
    monkeypatch.setattr("moepp.cli.import_.configs_folder", lambda: tmp_path)
    assert main(["import", str(GOLDEN / "published_flags"), str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert f"error: {tmp_path}/config.yaml line 1: found duplicate key name" in err and err.count("\n") == 1


def test_other_errors_are_not_taken_for_a_configurations(tmp_path):
    own_file(tmp_path, b"defaults: [tiny, _self_]\nnum_layers: ${model.num_layers}\n")
    assert composition_error(OSError("of training")) is None
    with pytest.raises(ConfigError, match=r"num_layers does not resolve"):
        from_hydra(sweep.configuration(sources(tmp_path), ["model=mine"]))

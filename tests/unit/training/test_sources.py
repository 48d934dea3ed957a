"""Configuration files of others can neither make Hydra act nor name code; the command line and shipped files can."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest

from moepp.cli.main import main as moepp
from moepp.config import configs_folder, register_defaults
from moepp.errors import ConfigError
from moepp.training import main as training
from moepp.training import sweep
from moepp.training.sources import Sources

register_defaults()
HANDLER = "{version: 1, handlers: {h: {class: logging.FileHandler, filename: victim, mode: w}}, root: {handlers: [h]}}"
# Content of experiment/x.yaml of somebody else, and the key that is refused.
REFUSED = {
    "a log file": (f"hydra: {{hydra_logging: {HANDLER}, job_logging: {HANDLER}}}", "hydra.hydra_logging.handlers.h"),
    "a formatter": (
        "hydra: {job_logging: {formatters: {a: {'()': subprocess.Popen}}}}",
        "hydra.job_logging.formatters",
    ),
    "a folder": ("hydra: {run: {dir: elsewhere}}", "hydra.run.dir"),
    "a folder by reference": ("train: {note: elsewhere}\nhydra: {run: {dir: '${train.note}'}}", "hydra.run.dir"),
    "its subfolder": ("hydra: {output_subdir: .hydra}", "hydra.output_subdir"),
    "the environment": ("hydra: {job: {env_set: {WORLD_SIZE: '9'}}}", "hydra.job.env_set.WORLD_SIZE"),
    "the working directory": ("hydra: {job: {chdir: true}}", "hydra.job.chdir"),
    "a callback": ("hydra: {callbacks: {a: {_target_: subprocess.Popen}}}", "hydra.callbacks.a._target_"),
    "a launcher": ("hydra: {launcher: {_target_: subprocess.Popen}}", "hydra.launcher._target_"),
    "a sweeper": ("hydra: {sweeper: {_target_: os.system}}", "hydra.sweeper._target_"),
    "many runs": ("hydra: {mode: MULTIRUN}", "hydra.mode"),
    "words of the command line": ("hydra: {overrides: {task: ['runtime.plugins=[this]']}}", "hydra.overrides"),
    "a group's package": ("defaults:\n  - /experiment/env@hydra.job.env_set", "hydra.job.env_set.CC"),
    "swept environment": ("hydra: {sweeper: {params: {+hydra.job.env_set.CC: x}}}", "'+hydra.job.env_set.CC'"),
    "swept plugins": ("hydra: {sweeper: {params: {runtime.plugins: '[this],[that]'}}}", "'runtime.plugins'"),
    "a swept section": ("hydra: {sweeper: {params: {runtime: '{plugins: [this]}'}}}", "'runtime'"),
    "plugins": ("runtime: {plugins: [this]}", "runtime.plugins=['this']"),
    "plugins by reference": (
        "model: {here: {plugins: [this]}}\nruntime: ${model.here}",
        "runtime.plugins='${model.here",
    ),
    "what a terminal obeys": ('hydra: {help: {header: "\\e[2J"}}', "hydra.help.header"),
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file to be kept, and the files of somebody else in others/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr("moepp.training.run.run_training", lambda _: pytest.fail("it was started"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "others/experiment").mkdir(parents=True)
    (tmp_path / "others/experiment/env.yaml").write_text("CC: evil\n")
    return tmp_path


def write(content: str, name: str = "experiment/x") -> None:
    file = Path("others", f"{name}.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"# @package _global_\n{content}\n" if name.startswith("experiment/") else f"{content}\n")


def configuration(*overrides: str, config_dir: str | None = "others", config_name: str = "config"):
    return sweep.configuration(Sources(str(configs_folder()), config_dir, config_name), overrides)


def refused(*overrides: str, **sources) -> str:
    with pytest.raises(ConfigError) as error:
        configuration(*overrides, **sources)
    assert "\n" not in str(error.value) and ";" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_files_of_others_cannot_act(name):
    content, key = REFUSED[name]
    write(content)
    message = refused("experiment=x")
    assert key in message and f"{os.getcwd()}/others" in message


@pytest.mark.parametrize("words", ["", "-m", "--help", "--cfg=job"])
def test_hydra_itself_refuses_before_it_writes(words, place):
    write(REFUSED["a log file"][0])
    arguments = [*words.split(), "--config-dir", "others", "experiment=x", "train.steps=-1"]
    with pytest.raises(ConfigError, match=r"hydra\.hydra_logging\.handlers\.h"):
        training._run(arguments)
    assert Path("victim").read_text() == "kept" and sorted(os.listdir()) == ["others", "victim"]


def test_commands_refuse_it_as_well(capsys):
    write(REFUSED["plugins"][0])
    sys.modules.pop("this", None)
    assert moepp(["plan", "--ranks", "1", "--config-dir", "others", "experiment=x"]) == 2
    error = capsys.readouterr().err
    assert "runtime.plugins=['this'] is set by" in error and error.count("\n") == 1 and "this" not in sys.modules


def test_sweeps_refuse_it():
    write(REFUSED["swept plugins"][0])
    with pytest.raises(ConfigError, match=r"names 'runtime\.plugins'"):
        sweep.plan(Sources(str(configs_folder()), "others", "config"), ["experiment=x"])


def test_it_does_not_matter_by_which_way_a_file_is_found(place):
    write("hydra: {job: {chdir: true}}")
    key = "hydra.job.chdir is set by"
    assert key in refused("experiment=x", f"hydra.searchpath=[file://{place}/others]", config_dir=None)
    up = os.path.relpath(place / "others/experiment/x", configs_folder() / "experiment")
    assert key in refused(f"experiment={up}", config_dir=None)
    write("defaults: [config, _self_]\nhydra: {job: {chdir: true}}", "primary")
    assert key in refused(config_name="primary")
    write("# @package _global_\nhydra: {job: {chdir: true}}", "primary")
    up = os.path.relpath(place / "others/primary", configs_folder())
    assert key in refused(config_name=up, config_dir=None)
    write("level: 1", "hydra/job_logging/mine")
    assert "hydra/job_logging=mine cannot be composed" in refused("hydra/job_logging=mine")


def test_a_search_path_of_others_names_folders_alone(place, monkeypatch):
    (place / "imported_by_search.py").write_text("")
    monkeypatch.syspath_prepend(place)
    write("defaults: [config, _self_]\nhydra: {searchpath: ['pkg://imported_by_search']}", "primary")
    assert "hydra.searchpath of primary.yaml names 'pkg://imported_by_search'" in refused(config_name="primary")
    assert "imported_by_search" not in sys.modules
    write("defaults: [config, {override experiment: y}, _self_]\nhydra: {searchpath: ['file://more']}", "primary")
    (place / "more/experiment").mkdir(parents=True)
    (place / "more/experiment/y.yaml").write_text("# @package _global_\ntrain: {steps: 7}\n")
    assert configuration(config_name="primary").train.steps == 7


def test_what_is_harmless_or_shipped_is_taken():
    write("hydra: {run: {dir: .}, help: {header: mine}, sweeper: {params: {train.steps: '1,2'}}}\ntrain: {steps: 5}")
    assert configuration("experiment=x").train.steps == 5
    copy = {path: path.read_text() for path in configs_folder().rglob("*.yaml")}
    for path, content in copy.items():
        target = Path("copied", path.relative_to(configs_folder()))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
    assert sweep.configuration(Sources(os.path.abspath("copied"), None, "config"), []).train.steps == 300
    Path("copied/config.yaml").write_text("defaults: [base, _self_]\ntrain: {steps: 6}\n")  # Hydra's own defaults
    assert sweep.configuration(Sources(os.path.abspath("copied"), None, "config"), []).train.steps == 6


def test_the_command_line_is_its_users():
    write("train: {steps: 5}")
    given = ["hydra.run.dir=out", "+hydra.job.env_set.A=b", "hydra.job.chdir=true", "hydra/job_logging=default"]
    assert configuration("experiment=x", *given, "runtime.plugins=[this]").runtime.plugins == ["this"]
    write("runtime: {plugins: [that]}")
    assert configuration("experiment=x", "runtime.plugins=[this]").runtime.plugins == ["this"]


@pytest.mark.parametrize(
    "words",
    ["hydra.run.dir=victim/x", "hydra/job_logging=default +hydra.job_logging.formatters.simple.class=nosuch.thing"],
)
def test_what_hydra_cannot_do_is_said_in_one_line(words):
    with pytest.raises(ConfigError, match=r"Hydra cannot do what its options and hydra\.\* keys say \(") as error:
        training._run(words.split())
    assert "\n" not in str(error.value)


def test_a_pickled_run_is_not_read():
    Path("run.pickle").write_bytes(pickle.dumps({}))
    with pytest.raises(ConfigError, match="reads a pickled file, which can run code"):
        training._run(["--experimental-rerun", "run.pickle"])

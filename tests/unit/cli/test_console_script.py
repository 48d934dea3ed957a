"""The console script: light help and version, wrong arguments in one line, commands under other names."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from moepp import __version__
from moepp.cli.main import commands, main

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_overview_and_version_import_nothing_heavy(argument):
    probe = (
        f"import sys; from moepp.cli.main import main; code = main([{argument!r}]);"
        "print([name for name in ('torch', 'numpy', 'hydra', 'yaml', 'deepspeed') if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"


def test_version_is_one_line(capsys):
    assert main(["--version"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"moepp {__version__} (torch ") and ", Python 3." in line and line.count("\n") == 1


@pytest.mark.parametrize("name", commands())
def test_every_command_shows_an_example_that_is_its_own(name, capsys):
    module = importlib.import_module(commands()[name])
    assert module.EXAMPLE.startswith(f"moepp {name} ")
    if hasattr(module, "main"):
        return  # Hydra's page, which has its own
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "example: moepp" in out and " ".join(module.EXAMPLE.split()) in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["evaluate"], "did you mean eval?"),
        (["pretrain"], "did you mean train?"),
        (["tokenize", "x"], "did you mean prepare?"),
        (["train.steps=3"], "to train, write `moepp train train.steps=3`"),
        (["--quiet"], "the command comes first"),
        ([""], "known commands: analyze, bench"),
        (["report", ""], "argument RUN: is empty; give a value"),
        (["checkpoint", "list", ""], "argument RUN: is empty; give a value"),
        (["checkpoint", "list", "nothing-here"], "nothing-here is not a run directory"),
        (["checkpoint", "prune", "x", "--keep", "1", "--keep", "2"], "argument --keep: is given twice; leave one out"),
        (["checkpoint", "prune", "x", "--keep", "1", "--yes", "--yes"], "argument --yes: is given twice"),
        (["report", "x", "--unigram-entropy", "nan"], "argument --unigram-entropy: 'nan' is not a finite number"),
        (["report", "x", "--unigram-entropy=-inf"], "is not a finite number"),
        (["report", ".", "--unigram-entropy", "-1"], "--unigram-entropy=-1.0 is below 0"),
        (["report", "x", "--unigram", "3"], "unrecognized arguments: --unigram (did you mean --unigram-entropy?); see"),
        # Not that --prompt, which is mistyped here, is missing.
        (["generate", "x", "--promt", "a"], "unrecognized arguments: --promt (did you mean --prompt?); see `moepp gen"),
        (["checkpoint", "prune", "x", "--kep", "1"], "unrecognized arguments: --kep (did you mean --keep?); see `moep"),
        (["bench", "layer", "--taus", "0.5", "inf"], "argument --taus: 'inf' is not a finite number"),
        (["bench", "layer", "--rounds", "1e3"], "argument --rounds: '1e3' is not an integer of at most 64 bits"),
        (["bench", "layer", "--rounds", str(2**63)], "is not an integer of at most 64 bits"),
        (["bench", "layer", "--json", " "], "argument --json: is empty"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and message in captured.err


def test_an_argument_may_be_empty_where_that_means_something(capsys):
    assert main(["generate", "nothing-here", "--prompt", ""]) == 2
    assert "nothing-here is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nothing-a", "--out", "x", "nothing-b"], "nothing-a is not a directory"),
        (["analyze", "communication", "nothing-a", "--tokens", "4096", "nothing-b"], "nothing-a is not a"),
        (["plan", "model=tiny", "--ranks", "0", "optim.lr=1"], "--ranks=0 is below its minimum 1"),
        (["checkpoint", "list", "nothing-a", "nothing-b"], "unrecognized arguments: nothing-b"),
    ],
)
def test_options_may_stand_between_positional_arguments(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_options_of_two_calls_do_not_count_as_given_twice(capsys):
    for _ in range(2):
        assert main(["report", "nothing-here", "--unigram-entropy", "3"]) == 2
        assert "nothing-here is not a directory" in capsys.readouterr().err


def test_reader_of_a_pipe_may_leave_early():
    command = f"set -o pipefail; {sys.executable} -m moepp --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr


def test_the_package_runs_as_a_program_for_launchers():
    done = subprocess.run([sys.executable, "-m", "moepp", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "__main__" not in done.stdout
    assert all(f"  {name} " in done.stdout for name in commands())

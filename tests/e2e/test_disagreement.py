"""Ranks that differ, or of which one cannot start, end within seconds with the same words, before anything is made."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.train_processes import TrainRun, TrainServer, write_corpus

NATIVE = ["engine=native", "train.steps=2", "train.global_batch_size=12"]
REMEDY = "start all ranks with the same command, packages and files"
LIMIT_SECONDS = 120.0  # far below parallel.timeout_seconds


def refused(
    server: TrainServer,
    run_dir: Path,
    overrides: Sequence[str],
    differing: Mapping[int, Sequence[str]],
    faults: Sequence[Sequence[Any]] = (),
    ranks: int = 2,
) -> TrainRun:
    start = time.monotonic()
    run = server.start(run_dir, ranks, [*NATIVE, *overrides], faults, differing)
    codes = run.wait(limit_seconds=LIMIT_SECONDS)
    assert codes == [2] * ranks, [run.output(rank) for rank in range(ranks)]
    assert time.monotonic() - start < LIMIT_SECONDS
    assert not run_dir.exists()
    return run


@pytest.mark.parametrize(
    ("differing", "told"),
    [
        ({1: ["optim.lr=0.5"]}, "rank 1 has optim.lr 0.5 instead of 0.01"),
        ({1: ["train.steps=5"]}, "rank 1 has train.steps 5 instead of 2"),
        (
            {1: ["run.seed=7", "model.moe.tau=0.5"]},
            "rank 1 has run.seed 7 instead of 1234, model.moe.tau 0.5 instead of",
        ),
        ({1: ["parallel.expert=2"]}, "rank 1 has parallel.expert 2 instead of 1"),
        ({1: ["model.hidden_size=32"]}, "rank 1 has model.hidden_size 32 instead of 16"),
        ({0: ["engine=deepspeed"]}, "rank 1 has engine.name native instead of deepspeed"),
    ],
)
def test_differing_configuration_is_refused_on_every_rank(server, corpus, tmp_path, differing, told):
    run = refused(server, tmp_path / "run", [corpus], differing)
    for rank in range(2):  # two logs, maybe on two hosts
        (line,) = [line for line in run.output(rank).splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: {told}") and line.endswith(REMEDY)


def test_differing_package_is_refused(server, corpus, tmp_path):
    run = refused(server, tmp_path / "run", [corpus], {}, [("other_version", 1, "numpy")])
    assert run.output(0).startswith("error: rank 1 has numpy 0.0.1 instead of ")


@pytest.mark.parametrize("differs", ["the plugin", "what it imports"])
def test_differing_source_of_a_plugin_is_refused(server, corpus, tmp_path, differs):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        for name, text in (("the plugin", "import helper_of_plugin\n"), ("what it imports", "")):
            file = {"the plugin": "plugin_of_test.py", "what it imports": "helper_of_plugin.py"}[name]
            (tmp_path / str(rank) / file).write_text(text + (f"RANK = {rank}\n" if name == differs else ""))
    faults = [("search_folder", rank, str(tmp_path / str(rank))) for rank in range(2)]
    run = refused(server, tmp_path / "run", [corpus, "runtime.plugins=[plugin_of_test]"], {}, faults)
    assert run.output(0).startswith("error: rank 1 has the source of plugin plugin_of_test (digest ")


@pytest.mark.parametrize("overrides", [["data.paths=[text]"], ["data.validation={held: [text]}"]])
def test_differing_copy_of_the_data_is_refused(server, corpus, tmp_path, overrides):
    """The same lengths, another text: only the content tells."""
    for name, seed in (("a", 0), ("b", 0)):
        (tmp_path / name).mkdir()
        write_corpus(tmp_path / name / "text", seed)
    other = tmp_path / "b/text.bin"
    tokens = bytearray(other.read_bytes())
    tokens[-2] ^= 1
    other.write_bytes(tokens)
    folders = [("change_folder", rank, str(tmp_path / name)) for rank, name in enumerate("ab")]
    run = refused(server, tmp_path / "run", [corpus, *overrides], {}, folders)
    for rank in range(2):
        (line,) = run.output(rank).splitlines()[-1:]
        assert line.startswith("error: rank 1 has text.bin (") and line.endswith("; copy the same files to every host")


def test_file_that_one_rank_lacks_is_named_with_the_rank(server, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_corpus(tmp_path / "a/text")
    folders = [("change_folder", rank, str(tmp_path / name)) for rank, name in enumerate("ab")]
    run = refused(server, tmp_path / "run", ["data.paths=[text]"], {}, folders)
    assert "error: rank 1: data.paths entry text names no data" in run.output(0)
    assert "error: data.paths entry text names no data" in run.output(1)


@pytest.mark.parametrize(
    ("rank", "override", "told"),
    [
        (1, "optim.lr=-1", "optim.lr=-1.0"),
        (0, "optim.lr=-1", "optim.lr=-1.0"),
        (1, "train.global_batch_size=7", "train.global_batch_size=7 is not divisible"),
        (1, "optim.learning_rate=1", "unknown configuration key optim.learning_rate"),
        (1, "engine=natve", "engine=natve does not exist"),
        (1, "optim.betas=[0.9,", "cannot be read"),
    ],
)
def test_invalid_configuration_of_one_rank_ends_all(server, corpus, tmp_path, rank, override, told):
    run = refused(server, tmp_path / "run", [corpus], {rank: [override]}, ranks=3)
    own = [line for line in run.output(rank).splitlines() if line.startswith("error: ")]
    assert len(own) == 1 and told in own[0]
    if rank != 0:
        assert run.output(0).startswith(f"error: rank {rank} cannot start: ") and told in run.output(0)
    # Silent; but where the first rank has left too early, as on a busy machine, a rank says the same itself.
    spoken = [line for line in run.output(2).splitlines() if line.startswith("error: ")]
    assert spoken in ([], run.output(0).splitlines()[:1]) and "Traceback" not in run.output(2)


def test_rank_killed_while_the_files_are_compared_is_named(server, corpus, tmp_path):
    run = server.start(tmp_path / "run", 3, [corpus, *NATIVE], [("die_in", 1, "moepp.training.run", "file_facts")])
    assert run.wait(limit_seconds=LIMIT_SECONDS) == [5, -9, 5]
    for rank in (0, 2):
        assert re.search(r"rank 1( on \S+)? does not answer", run.output(rank)), run.output(rank)


def test_rank_killed_before_it_comes_is_named(server, corpus, tmp_path):
    overrides = [corpus, *NATIVE, "parallel.timeout_seconds=3"]
    run = server.start(tmp_path / "run", 3, overrides, [("die_in", 1, "moepp.training.run", "start_facts")])
    assert run.wait(limit_seconds=LIMIT_SECONDS) == [5, -9, 5]
    assert "rank 1 of 3 did not come to 127.0.0.1:" in run.output(0)
    assert "rank 1 of 3 did not come to 127.0.0.1:" in run.output(2)


def test_other_processor_is_remarked_and_each_rank_logs_who_it_is(server, corpus, tmp_path):
    run = server.train(tmp_path / "run", 2, [corpus, *NATIVE], [("other_processor", 1, "Other CPU")])
    assert "rank 1 has processor Other CPU instead of " in run.output(0)
    for rank in range(2):
        assert f"rank {rank} of 2 on " in (tmp_path / f"run/log/rank-{rank}.txt").read_text()
